"""How a sweep grows with its batch, and what Prefect and the store add to it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from benchmarks.common import Row
from entropy_core.demo import main as make_demo_run
from flows.service import environment, service

SIZES = (1024, 4096, 16384, 32768)
ORCHESTRATED, SHARD = 20480, 10240  # stages of some seconds, as those of a real model have at least
ROUNDS = 2


def scale() -> Iterator[Row]:
    """1K to 32K sequences of the demo run, every stage of one checkpoint."""
    _demo_run()
    found = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as store:
            found[size] = _sweep(size, store)
    for size, (taken, peak) in found.items():
        first_taken, first_peak = found[SIZES[1]]
        yield Row(
            f"sweep of one checkpoint, {size:,} sequences",
            f"{taken:.1f} s, peak {peak:,.0f} MiB",
            f"{first_taken:.1f} s, peak {first_peak:,.0f} MiB at {SIZES[1]:,}",
            taken / first_taken,
        )
    _, (small, small_peak), (large, _), (largest, largest_peak) = found.values()
    yield Row(
        f"peak memory, {SIZES[3]:,} sequences",
        f"{largest_peak:,.0f} MiB",
        f"{small_peak:,.0f} MiB at {SIZES[1]:,}",
        largest_peak / small_peak,
        "≤ 1.1",
    )
    late, early = (largest - large) / (SIZES[3] - SIZES[2]), (large - small) / (SIZES[2] - SIZES[1])
    yield Row(
        f"time per further sequence, {SIZES[2]:,} to {SIZES[3]:,}",
        f"{1000 * late:.2f} ms",
        f"{1000 * early:.2f} ms, {SIZES[1]:,} to {SIZES[2]:,}",
        late / early,
        "≤ 1.1",
    )


def orchestration() -> Iterator[Row]:
    """The same stages called directly and as Prefect tasks, in turns; then again with everything cached."""
    _demo_run()
    direct, cold, warm = [], [], []
    with service() as (api_url, _):
        through = environment(api_url)
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as store:
                direct.append(_sweep(ORCHESTRATED, store, SHARD)[0])
            with tempfile.TemporaryDirectory() as store:
                cold.append(_sweep(ORCHESTRATED, store, SHARD, through)[0])
                warm.append(_sweep(ORCHESTRATED, store, SHARD, through)[0])
    ours, other, again = (sum(times) / len(times) for times in (cold, direct, warm))
    what = f"{ORCHESTRATED:,} sequences in {ORCHESTRATED // SHARD} shards through Prefect, mean of {ROUNDS}"
    against = f"{other:.1f} s, the same stages called directly"
    yield Row(f"sweep of {what}", f"{ours:.1f} s", against, ours / other, "≤ 1.05")
    yield Row(f"cached sweep of {what}", f"{again:.1f} s", f"{ours:.1f} s, the cold one", again / ours, "≤ 0.03")


def _demo_run() -> None:
    make_demo_run(["--out", "artifacts/demo-run"])


def _sweep(
    sequences: int, store: str, shard_size: int = 1024, through_prefect: Mapping[str, str] | None = None
) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.sweep_once", "--sequences", str(sequences), "--store", store]
    command += ["--shard-size", str(shard_size)]
    if through_prefect:
        command.append("--through-prefect")
    done = subprocess.run(command, env={**os.environ, **(through_prefect or {})}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["seconds"], found["megabytes"]
