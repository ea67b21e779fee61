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
WHY_MISSED = (  # how the name of a row begins, and what profiling has found
    (
        "log-probabilities and entropies",
        "eight tenths of both are the same matrix products, whose time scatters: on 2,048 tokens the ratio was between"
        " 0.95 and 1.09, in runs in which the same forward pass took between 4.8 and 6.4 s.",
    ),
    (
        "peak memory, twice the tokens",
        "a few MiB of the allocator; what is kept per token is two numbers.",
    ),
    (
        "ℓ̇ and ḣ, forward mode",
        "four fifths are matrix products, three for each of the forward pass as there must be; the rest is sums of"
        " products and the derivatives of norms, activations and attention, which the forward pass has not.",
    ),
    (
        "ℓ̇ and ḣ, fast path",
        "two scoring passes, and then all parameters are moved twice, in float64: a fixed cost, which is small only"
        " beside more tokens than these.",
    ),
    (
        "η sweep of 5 points",
        "all parameters are moved five times, into fresh memory: a second each beside passes of 13 seconds. It does not"
        " grow with the tokens.",
    ),
    (
        "sweep of 16,384 sequences through Prefect",
        "127 stages of about a second: each costs the server a tenth of a second of a core, and on two cores that is"
        " taken from the stage.",
    ),
    (
        "cached sweep of",
        "half of it is not the stages: the plan, which looks for all artifacts, and publishing tables and report; it"
        " does not grow with the work that was cached.",
    ),
    (
        "SmolLM2 LoRA run",
        "the time of both is that of their matrix products: seven passes here, one of them forward mode, and eleven"
        " there, one of them with a backward pass. Answers have at most 20 tokens, so that reward-to-go and baseline"
        " take little away from the standard error.",
    ),
)
DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    """Measure the groups that are asked for, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all of {', '.join(GROUPS)} unless told")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.json and benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    path = options.out / "benchmarks.json"
    for group in options.groups or GROUPS:
        print(f"{group} …", flush=True)
        rows = []
        for row in GROUPS[group]():
            rows.append({"group": group, "date": time.strftime("%Y-%m-%d"), **asdict(row), "holds": row.holds})
            print(
                f"  {row.name}: {row.ours} against {row.against}: {row.ratio:.3g} {_verdict(row.mark, row.holds)}",
                flush=True,
            )
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        kept = [row for row in found["rows"] if row["group"] != group]
        ordered = sorted(kept + rows, key=lambda row: list(GROUPS).index(row["group"]))
        write({"setting": _setting(), "rows": ordered}, options.out)


def write(found: dict, folder: Path) -> None:
    """Both files; every missed mark is given its reason."""
    for row in found["rows"]:
        why = next((why for begin, why in WHY_MISSED if row["name"].startswith(begin)), "")
        row["reason"] = why if row["holds"] is False else ""
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
        "dtype": "float32, TF32 off",
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
        "Written by `make bench`. The two columns of a row were measured in one process or in processes that took",
        "turns; the ratio is the median of the ratios within a round.",
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
    reasons = [f"- {row['name']}: {row['reason']}" for row in found["rows"] if row["reason"]]
    if reasons:
        lines += ["", "## Why a mark is missed", "", *reasons]
    dates = sorted({row["date"] for row in found["rows"]})
    return "\n".join([*lines, "", f"Measured {' and '.join(dates)}.", ""])


if __name__ == "__main__":
    main()
