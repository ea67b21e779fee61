"""What several workers gain on a sweep of two checkpoints, and what it takes to have them."""

import os
import statistics
import tempfile
from collections.abc import Iterator

from benchmarks.common import Row
from benchmarks.reasons import by_stage
from benchmarks.scale import demo_run, one_sweep

SEQUENCES, SHARD, ROUNDS = 16384, 2048, 2
CHECKPOINTS = 2


def workers() -> Iterator[Row]:
    """Two workers against one, in turns, each with one thread."""
    demo_run()
    one_thread = {"OMP_NUM_THREADS": "1"}
    found: dict[int, list] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for count, of in found.items():
            with tempfile.TemporaryDirectory() as store:
                settings = f"--shard-size {SHARD} --checkpoints {CHECKPOINTS} --workers {count}"
                of.append(one_sweep(SEQUENCES, store, *settings.split(), environment=one_thread))
    alone, both = found.values()
    ours, other = (statistics.mean(of.seconds for of in sweeps) for sweeps in (both, alone))
    what = f"sweep of {CHECKPOINTS} checkpoints of the demo run, {SEQUENCES:,} sequences each"
    what = f"{what}, two workers, mean of {ROUNDS}"
    cores = len(os.sched_getaffinity(0))
    against = f"{other:.1f} s, one worker; {cores} cores, one thread each"
    yield Row(what, f"{ours:.1f} s", against, other / ours, "≥ 1.6").because(
        lambda: f"{by_stage(both[-1].stages, alone[-1].stages)}; what is left is computed by the sweep itself"
    )
    beyond = statistics.mean(of.dispatch for of in both)
    yield Row(
        "dispatch and transfer: what runs in two workers take beyond their stages",
        f"{beyond:.2f} s",
        f"{2 * ours:.1f} s, the sweep's of both workers",
        beyond / (2 * ours),
        "≤ 0.05",
    ).because(lambda: "the stages are short, and each run is verified, locked, written and synced to disk")
