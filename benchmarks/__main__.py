"""Every ratio of docs/benchmarks.md, measured side by side: `make bench`, or `python -m benchmarks [GROUP ...]`."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import (
    interventions,
    model_shape,
    passes,
    samplers,
    sampling,
    scale,
    shards,
    time_to_error,
    vectors,
    workers,
)
from benchmarks.common import Row
from benchmarks.device.page import section

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "sampling": sampling.sampling,
    "scoring": passes.scoring,
    "scoring_memory": passes.scoring_memory,
    "derivatives": passes.derivatives,
    "step_sizes": passes.step_sizes,
    "padding": passes.padding,
    "vectors": vectors.vectors,
    "shards": shards.shards,
    "workers": workers.workers,
    "scale": scale.scale,
    "orchestration": scale.orchestration,
    "time_to_error": time_to_error.time_to_error,
    "time_to_error_smollm2": time_to_error.time_to_error_smollm2,
    "samplers": samplers.samplers,
    "interventions": interventions.interventions,
    "interventions_smollm2": interventions.interventions_smollm2,
}
DOCS = Path(__file__).resolve().parents[1] / "docs"
DEVICE = DOCS / "device.json"


def main() -> None:
    """Measure the groups that are asked for, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all of {', '.join(GROUPS)} unless told")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.json and benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    path = options.out / "benchmarks.json"
    table: dict[str, Any] = {}
    if options.groups and path.exists():  # else the table is begun anew
        table = json.loads(path.read_text(encoding="utf-8"))
    for group in options.groups or GROUPS:
        print(f"{group} …", flush=True)
        started = time.monotonic()
        rows: list[dict[str, Any]] = []
        for row in GROUPS[group]():
            rows.append(asdict(row) | {"holds": row.holds})
            print(f"  {row.name}: {row.ours} against {row.against}: {row.ratio:.3g} {_verdict(row)}", flush=True)
        table[group] = {"date": time.strftime("%Y-%m-%d"), "setting": setting(), "rows": rows}
        write({name: table[name] for name in GROUPS if name in table}, options.out)
        print(f"  {(time.monotonic() - started) / 60:.0f} min", flush=True)


def write(found: dict, folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(page(found), encoding="utf-8")


def setting() -> dict[str, str]:
    """What the figures hold for."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores ({_processor()})"
    )
    return {
        "device": device,
        "model": model_shape.name(),
        "dtype": f"{' and '.join(passes.DTYPES)}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """Which, where Linux says it, and what its matrix products are made with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _verdict(row: Row) -> str:
    return {None: "", True: f"({row.mark}: holds)", False: f"({row.mark}: missed; {row.reason})"}[row.holds]


def page(found: dict[str, Any]) -> str:
    """docs/benchmarks.md: a table for each group, which was measured in one run on one machine."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Passes were run in rounds, every way once in each; their ratio is the median of the",
        "ratios within a round. Sampling and whole sweeps were run once, or as often as their row says. Where a mark",
        "was missed, both ways were run once more under a profiler, or the stages' own times were compared. A ratio is",
        "of one run on one machine; two tables may come from two.",
    ]
    for group, measured in found.items():
        where = ", ".join(f"{name} {value}" for name, value in measured["setting"].items())
        lines += ["", f"## {group.replace('_', ' ').capitalize()}", "", f"Measured {measured['date']}: {where}.", ""]
        lines += ["| what | measured | against | ratio | mark | holds |", "|---|---|---|---:|---|---|"]
        missed: dict[str, list[str]] = {}  # names by reason: rows of one measurement share theirs
        for row in measured["rows"]:
            holds = {None: "", True: "yes", False: "**no**"}[row["holds"]]
            cells = (row["name"], row["ours"], row["against"], f"{row['ratio']:.3g}", row["mark"], holds)
            lines.append(f"| {' | '.join(cells)} |")
            if row["reason"]:
                missed.setdefault(row["reason"], []).append(row["name"])
        if missed:
            lines += ["", "Why a mark is missed:", ""]
            lines += [f"- {'; '.join(names)}: {reason}" for reason, names in missed.items()]
    device = json.loads(DEVICE.read_text(encoding="utf-8")) if DEVICE.exists() else None
    return "\n".join([*lines, "", *section(device), ""])


if __name__ == "__main__":
    main()
