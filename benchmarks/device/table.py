"""The result table of `benchmarks.device`; every row is printed and saved at once, so that a killed run loses none."""

import json
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

Row = Mapping[str, Any]


class Table:
    """Rows in four groups, and the hardware and versions they were measured with.

    The groups: `right` (errors against the CPU), `long` (time and memory of long responses), `fast` (speed), `fits`
    (memory against the formulas). A row with `holds: False` fails the check. A group of another name is created by
    `add`, and cannot fail.

    Args:
        path: JSON file to write; None: only print.
        device: the device under test.
        seconds: time budget of the whole check.
    """

    def __init__(self, path: Path | None, device: torch.device, seconds: float) -> None:
        self.path, self._started, self._seconds = path, time.monotonic(), seconds
        self.found: dict[str, Any] = {
            "setting": setting(device),
            "finished": False,
            "right": [],
            "long": [],
            "fast": [],
            "fits": [],
        }

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (time.monotonic() - self._started)

    def add(self, group: str, row: Row) -> None:
        """Append a row to a group, print it, and rewrite the JSON; a group that does not exist yet is created."""
        self.found.setdefault(group, []).append(dict(row))
        print(f"{group:6} " + "  ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
        self.write()

    @contextmanager
    def attempt(self, group: str, what: str) -> Iterator[None]:
        """Record an exception in the block as a failed row (`holds: False`) instead of ending the check."""
        try:
            yield
        except Exception as error:
            where = traceback.format_exc(limit=-8)  # the eight innermost frames
            self.add(
                group, {"what": what, "holds": False, "note": f"{type(error).__name__}: {error}", "traceback": where}
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Rewrite the JSON, with the elapsed seconds and the failed rows; by a rename, so that it is always whole."""
        self.found["seconds"] = round(time.monotonic() - self._started, 1)
        self.found["failed"] = [
            row["what"]
            for group in ("right", "long", "fast", "fits")
            for row in self.found[group]
            if row.get("holds") is False
        ]
        if self.path is not None:
            draft = self.path.with_name(f"{self.path.name}.part")
            draft.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            draft.replace(self.path)


def setting(device: torch.device) -> dict[str, str]:
    """Device, memory, versions, threads and date of a run: timings are comparable only where these agree."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{os.cpu_count()} CPU cores",
        "memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB" if on_gpu else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d"),
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
