"""The last checkpoints of the demo run, probed once in a process of its own; prints as JSON what that took.

The JSON: seconds and megabytes at the peak of all; seconds by stage, and the stage that raised the peak last; and
seconds that the runs in workers took beyond their stages.

python -m benchmarks.sweep_once --sequences 4096 --store FOLDER [--shard-size 1024] [--checkpoints 1]
    [--through-prefect | --workers 2]
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import status_kilobytes
from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.pipeline.threads import Threads
from entropy_core.store.manifest import MANIFEST
from entropy_core.store.store import Store
from entropy_core.workers.pool import Pool
from entropy_core.workers.process import WorkerProcess
from tasks.device import compute

RUN = Path("artifacts/demo-run")


def main() -> None:
    """Probe, and say what it took. Importing is not counted: it is the same in both ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--through-prefect", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    config = {
        "name": "benchmark",
        "checkpoints": [str(path) for path in _by_step()[-options.checkpoints :]],
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
        execution = execution_for(parsed, checkpoints)
        with Pool([{}] * options.workers, compute, TimedWorker.start) as pool:
            threads = Threads(max(1, options.workers))
            of_stages = pool.compute if options.workers else compute
            run = Runner(lambda stage, inputs, _: of_stages(store, stage, execution, inputs), threads)
            sweep(parsed, checkpoints, store, run)
    taken = time.perf_counter() - started
    peak = status_kilobytes("VmHWM") / 1024
    of_stages = _of_stages(options.store)
    dispatch = sum(TimedWorker.taken) - sum(map(of_stages["stages"].get, TimedWorker.stages), 0.0)
    print(json.dumps({"seconds": taken, "megabytes": peak, "dispatch": dispatch, **of_stages}), flush=True)


class TimedWorker(WorkerProcess):
    """A worker whose runs of stages are timed, from the question to the answer."""

    taken: ClassVar[list[float]] = []
    stages: ClassVar[set[str]] = set()

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """See `WorkerProcess.ask`."""
        started = time.perf_counter()
        answer = super().ask(method, *arguments, **options)
        if method == "run":
            self.taken.append(time.perf_counter() - started)
            self.stages.add(arguments[0].stage)
        return answer


def _by_step() -> list[Path]:
    return sorted(RUN.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


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
