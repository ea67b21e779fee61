"""One checkpoint of the demo run, probed once in a process of its own; prints as JSON what that took.

The JSON: seconds and megabytes at the peak of all; seconds by stage, and the stage that raised the peak last.

python -m benchmarks.sweep_once --sequences 4096 --store FOLDER [--shard-size 1024] [--through-prefect]
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import status_kilobytes
from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.store.manifest import MANIFEST
from entropy_core.store.store import Store

RUN = Path("artifacts/demo-run")


def main() -> None:
    """Probe, and say what it took. Importing is not counted: it is the same in both ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--through-prefect", action="store_true")
    options = parser.parse_args()
    config = {
        "name": "benchmark",
        "checkpoints": [str(max(RUN.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))],
        "batch_config": {
            "E_total_sequences": options.sequences,
            "B_U": 64,
            "G": 8,
            "dataset_name": "arithmetic",
        },
        "generation": {"max_new_tokens": 32},
        "update": {"reward": "arithmetic"},
        "importance": {"etas": [0, 0.1, 0.3, 1, 3], "estimators": ["per_decision", "snis"]},
        "execution": {"artifacts": str(options.store), "shard_size": options.shard_size},
    }
    if options.through_prefect:
        from flows.entropy_probe import checkpoint_sweep
    import entropy_core.policy.model  # noqa: F401  (what a stage would import)

    started = time.perf_counter()
    if options.through_prefect:
        checkpoint_sweep(config)
    else:
        parsed = parse_config(config)
        checkpoints, store = preflight(parsed), Store(parsed.store_root)
        sweep(parsed, checkpoints, store, direct_runner(store, execution_for(parsed, checkpoints)))
    taken = time.perf_counter() - started
    peak = status_kilobytes("VmHWM") / 1024
    print(json.dumps({"seconds": taken, "megabytes": peak, **_of_stages(options.store)}), flush=True)


def _of_stages(store: Path) -> dict[str, Any]:
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in store.glob(f"*/*/{MANIFEST}")]
    stages: Counter[str] = Counter()
    for manifest in manifests:
        stages[manifest["stage"]] += manifest["wall_seconds"]
    highest = max(of["peak_rss_bytes"] for of in manifests)
    first = min((of["created"], of["stage"]) for of in manifests if of["peak_rss_bytes"] == highest)
    return {"stages": stages, "highest": first[1]}


if __name__ == "__main__":
    main()
