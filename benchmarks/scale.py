"""How a sweep grows with its batch, and what Prefect and the store add to it."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.common import Row, Run, peak_megabytes
from benchmarks.reasons import by_stage
from entropy_core.demo.run import main as make_demo_run
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.numerics import ragged
from entropy_core.numerics.functional import TokenPair, Tokens
from entropy_core.numerics.uncertainty import entropy_derivative
from flows.service import environment, service

SIZES = (1024, 4096, 16384, 32768)
ORCHESTRATED, SHARD = 30720, 15360  # two minutes or more; stages of some seconds, as those of a real model have
ROUNDS, ROUNDS_OF_SIZES = 2, 3
LONG, SHARD_OF_LONG, ETA = 16384, 1024, 1e-4  # made-up answers, and how far they are moved


def scale() -> Iterator[Row]:
    """1K to 32K sequences of the demo run, every stage of one checkpoint."""
    demo_run()
    taken: dict[int, list[Sweep]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS_OF_SIZES):
        for size, of in taken.items():
            with tempfile.TemporaryDirectory() as store:
                of.append(_sweep(size, store))
    found = [sorted(of, key=lambda run: run.seconds)[len(of) // 2] for of in taken.values()]  # those of median time
    _, small, large, largest = found
    for size, of in zip(SIZES, found, strict=True):
        yield Row(
            f"sweep of one checkpoint, {size:,} sequences, median of {ROUNDS_OF_SIZES}",
            f"{of.seconds:.1f} s, peak {of.megabytes:,.0f} MiB",
            f"{small.seconds:.1f} s, peak {small.megabytes:,.0f} MiB at {SIZES[1]:,}",
            of.seconds / small.seconds,
        )
    yield Row(
        f"peak memory, {SIZES[3]:,} sequences",
        f"{largest.megabytes:,.0f} MiB",
        f"{small.megabytes:,.0f} MiB at {SIZES[1]:,}",
        largest.megabytes / small.megabytes,
        "≤ 1.1",
    ).because(lambda: f"the peak of the process was first reached in stage {largest.highest}, there in {small.highest}")
    late, early = _per_sequence(large, largest, SIZES[2:]), _per_sequence(small, large, SIZES[1:3])
    yield Row(
        f"time per further sequence, {SIZES[2]:,} to {SIZES[3]:,}",
        f"{sum(late.values()):.2f} ms",
        f"{sum(early.values()):.2f} ms, {SIZES[1]:,} to {SIZES[2]:,}",
        sum(late.values()) / sum(early.values()),
        "≤ 1.1",
    ).because(lambda: by_stage(late, early, "milliseconds per sequence"))
    yield _long_answers()


def orchestration() -> Iterator[Row]:
    """The same stages called directly and as Prefect tasks, in turns; then again with everything cached."""
    demo_run()
    direct, cold, warm, warm_direct = [], [], [], []
    with service() as (api_url, _):
        through = environment(api_url)
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as store:
                direct.append(_sweep(ORCHESTRATED, store, SHARD))
                warm_direct.append(_sweep(ORCHESTRATED, store, SHARD))
            with tempfile.TemporaryDirectory() as store:
                cold.append(_sweep(ORCHESTRATED, store, SHARD, through))
                warm.append(_sweep(ORCHESTRATED, store, SHARD, through))
    runs = cold, direct, warm, warm_direct
    ours, other, again, again_direct = (statistics.mean(of.seconds for of in sweeps) for sweeps in runs)
    what = f"{ORCHESTRATED:,} sequences in {ORCHESTRATED // SHARD} shards through Prefect, mean of {ROUNDS}"
    against = f"{other:.1f} s, the same stages called directly"
    row = Row(f"sweep of {what}", f"{ours:.1f} s", against, ours / other, "≤ 1.05")
    yield row.because(lambda: f"{by_stage(cold[-1].stages, direct[-1].stages)}; all else is Prefect's and the store's")
    row = Row(f"cached sweep of {what}", f"{again:.1f} s", f"{ours:.1f} s, the cold one", again / ours, "≤ 0.03")
    yield row.because(
        lambda: f"called directly, a cached sweep takes {again_direct:.1f} s; the rest is Prefect's flow and tasks"
    )


def _long_answers() -> Row:
    """The statistics of made-up answers of up to 2,000 tokens: those of one shard are held at a time."""
    ours, other = (peak_megabytes(_statistics, shards) for shards in (LONG // SHARD_OF_LONG, 1))
    return Row(
        f"peak memory of the statistics, {LONG:,} sequences of 1,000 tokens, shards of {SHARD_OF_LONG:,}",
        f"{ours:,.0f} MiB",
        f"{other:,.0f} MiB, one shard",
        ours / other,
    )


def _statistics(shards: int) -> Run:
    size = LONG // shards

    def tokens(shard: int) -> Tokens:
        generator = torch.Generator().manual_seed(shard)
        lengths_N = torch.randint(1, 2000, (size,), generator=generator)
        columns = torch.randn(4, int(lengths_N.sum()), generator=generator)
        along, offsets_N1 = TokenPair(*columns[2:]), ragged.offsets_from_lengths(lengths_N)
        return Tokens(-columns[0].abs(), columns[1].abs(), offsets_N1, along)

    def moved() -> Iterator[MovedTokens]:
        for at in map(tokens, range(shards)):
            along = at.derivatives
            yield MovedTokens(at.logprobs_K + ETA * along.logprob_K, at.entropies_K + ETA * along.entropy_K)

    def run() -> None:
        batch = EvaluationBatch.of([partial(tokens, shard) for shard in range(shards)], None, "time_loo")
        batch.standard_error(entropy_derivative(batch.columns, "per_token"))
        measured(batch, Moved(ETA, moved), "per_decision")

    return run


def demo_run() -> None:
    """Train the demo policy, unless that was done."""
    make_demo_run(["--out", "artifacts/demo-run"])


class Sweep(NamedTuple):
    """What `sweep_once` prints."""

    seconds: float
    megabytes: float
    stages: dict[str, float]
    highest: str
    dispatch: float


def _per_sequence(small: Sweep, large: Sweep, sizes: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds per further sequence, by stage, and what is outside of the stages."""
    count = (sizes[1] - sizes[0]) / 1000
    of_stages = {stage: (large.stages[stage] - small.stages[stage]) / count for stage in large.stages}
    return of_stages | {"outside": (large.seconds - small.seconds) / count - sum(of_stages.values())}


def _sweep(
    sequences: int, store: str, shard_size: int = 1024, through_prefect: Mapping[str, str] | None = None
) -> Sweep:
    options = ["--shard-size", str(shard_size), *(["--through-prefect"] if through_prefect else [])]
    return one_sweep(sequences, store, *options, environment=through_prefect or {})


def one_sweep(sequences: int, store: str, *options: str, environment: Mapping[str, str]) -> Sweep:
    """Run `sweep_once` in a process of its own.

    Args:
        sequences: of E.
        store: a folder.
        options: further ones.
        environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", "benchmarks.sweep_once", "--sequences", str(sequences), "--store", store, *options]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return Sweep(**json.loads(done.stdout.strip().splitlines()[-1]))
