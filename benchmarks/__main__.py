"""Every ratio of docs/benchmarks.md, measured side by side: `make bench`, or `python -m benchmarks [GROUP ...]`."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from benchmarks import model_shape, passes, sampling, scale, time_to_error
from benchmarks.common import Row

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "sampling": sampling.sampling,
    "scoring": passes.scoring,
    "derivatives": passes.derivatives,
    "step_sizes": passes.step_sizes,
    "padding": passes.padding,
    "scale": scale.scale,
    "orchestration": scale.orchestration,
    "time_to_error": time_to_error.time_to_error,
}
DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    """Measure the groups that are asked for, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all of {', '.join(GROUPS)} unless told")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.json and benchmarks.md")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page from benchmarks.json")
    options = parser.parse_args()
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    path = options.out / "benchmarks.json"
    if options.page:  # after the reason of a missed mark was written into the file
        write(json.loads(path.read_text(encoding="utf-8")), options.out)
        return
    for group in options.groups or GROUPS:
        print(f"{group} …", flush=True)
        rows = []
        for row in GROUPS[group]():
            rows.append(row)
            print(
                f"  {row.name}: {row.ours} against {row.against}: {row.ratio:.3g} {_verdict(row.mark, row.holds)}",
                flush=True,
            )
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        write({"setting": _setting(), "rows": measured_anew(found["rows"], group, rows)}, options.out)


def measured_anew(found: list[dict], group: str, rows: list[Row]) -> list[dict]:
    """All rows, those of a group replaced; a mark that is missed again is missed for the reason that was found."""
    reasons = {(row["name"], row["mark"]): row["reason"] for row in found if row["group"] == group}
    new = [
        {
            "group": group,
            "date": time.strftime("%Y-%m-%d"),
            **asdict(row),
            "holds": row.holds,
            "reason": reasons.get((row.name, row.mark), "") if row.holds is False else "",
        }
        for row in rows
    ]
    kept = [row for row in found if row["group"] != group]
    return sorted(kept + new, key=lambda row: list(GROUPS).index(row["group"]))


def write(found: dict, folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(page(found), encoding="utf-8")


def _setting() -> dict[str, str]:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
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


def _verdict(mark: str, holds: bool | None) -> str:
    return "" if holds is None else f"({mark}: {'holds' if holds else 'missed'})"


def page(found: dict) -> str:
    """docs/benchmarks.md."""
    setting = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; why a mark is missed is put into `benchmarks.json` by hand, and stays there while it",
        "is missed. Passes were run in rounds, every way once in each; their ratio is the median of the ratios within",
        "a round. Sampling and whole sweeps were run once, or as often as their row says.",
        "",
        f"{setting}.",
        "",
        "| what | measured | against | ratio | mark | holds |",
        "|---|---|---|---:|---|---|",
    ]
    for row in found["rows"]:
        holds = {None: "", True: "yes", False: "**no**"}[row["holds"]]
        lines.append(
            f"| {row['name']} | {row['ours']} | {row['against']} | {row['ratio']:.3g} | {row['mark']} | {holds} |"
        )
    missed: dict[str, list[str]] = {}  # names by reason: rows of one measurement share theirs
    for row in found["rows"]:
        if row["reason"]:
            missed.setdefault(row["reason"], []).append(row["name"])
    if missed:
        lines += ["", "## Why a mark is missed", ""]
        lines += [f"- {'; '.join(names)}: {reason}" for reason, names in missed.items()]
    dates = sorted({row["date"] for row in found["rows"]})
    return "\n".join([*lines, "", f"Measured {' and '.join(dates)}.", ""])


if __name__ == "__main__":
    main()
