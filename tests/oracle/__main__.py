"""Run scenarios one after the other; after each, write what was counted and the page. `make validate-long`."""

import argparse
import json
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

from oracle import shared
from oracle.counts import Counts, counted, merged
from oracle.page import SHARED, page
from oracle.scenarios import PLAIN, SCENARIOS, Ready, Scenario

ROOT = Path(__file__).resolve().parents[2]


def replicated(scenario: Scenario, replications: int, seed: int = 0) -> Counts:
    """The counts of a scenario.

    Args:
        scenario: the scenario.
        replications: how many, independent of each other and of those of other seeds.
        seed: of the batches; policy, rewards and moments are the same for every seed.

    Returns:
        What is counted.
    """
    started = time.process_time()
    ready = Ready(scenario)
    ready.generator.manual_seed(7_919 * (seed + 1))
    found = []
    for _ in range(replications):
        e_N, u_N = ready.draw()
        step = ready.laboratory.step(ready.trainer, u_N)
        found.append(ready.laboratory.rows(ready.trainer, step, e_N, ready.learning_rate))
    counts = counted(found) | {"seconds": round(time.process_time() - started, 1)}
    if not scenario.null and scenario != PLAIN:
        counts["p_values"] = {}  # only these are put into families
    return counts


def main() -> None:
    """Go on where the last call stopped."""
    parser = argparse.ArgumentParser(prog="make validate-long", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenarios", nargs="*", default=[], metavar="TEXT", help="those whose name has it; else all")
    parser.add_argument("--replications", type=int, default=200, help="of each scenario, earlier ones included (200)")
    parser.add_argument("--again", action="store_true", help="forget what was counted of these scenarios before")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of both files")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = options.out / "validation-long.json"
    known: dict[str, Counts] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write() -> None:
        labels = [*(one.label for one in SCENARIOS), SHARED]
        ordered = {label: known[label] for label in labels if label in known}
        lines = [f"{json.dumps(label, ensure_ascii=False)}: {json.dumps(of)}" for label, of in ordered.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        (options.out / "validation-long.md").write_text(page(ordered), encoding="utf-8")

    for scenario in SCENARIOS:
        if options.scenarios and not any(text in scenario.label for text in options.scenarios):
            continue
        before = None if options.again else known.get(scenario.label)
        missing = options.replications - (before["replications"] if before else 0)
        if missing <= 0:
            continue
        counts = replicated(scenario, missing, before["replications"] if before else 0)
        counts = merged(before, counts) if before else counts
        counts["date"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        known[scenario.label] = counts
        write()
        print(f"{scenario.label}: {counts['seconds']:.0f} s", flush=True)
    if not options.scenarios or any(text in SHARED for text in options.scenarios):
        known[SHARED] = shared.counted(shared.pairs(options.replications))
        write()


if __name__ == "__main__":
    main()
