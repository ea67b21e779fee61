"""E drawn by vLLM beside E drawn exactly, on SmolLM2's LoRA run: whether they agree over some seeds, and how fast."""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.common import Row
from benchmarks.time_to_error import SMOLLM2, UntilUpdate, until_update
from entropy_core.config.read import load_config, parse_config
from entropy_core.estimates.batches import evaluation_batch, moved_batch
from entropy_core.estimates.measurement import measured
from entropy_core.estimates.rows import change_of
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.uncertainty import entropy, entropy_derivative
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.batch_inputs import sampled_e
from entropy_core.pipeline.specs import sampler_of
from entropy_core.pipeline.stages_of import StagesOf
from entropy_core.sequences.files import read_sequences
from entropy_core.store.columns import read_tokens

SEEDS, SEQUENCES = 10, 32
PYTHON = "VLLM_PYTHON"
"""Variable of the environment: the Python of an environment that has vLLM."""


class Drawn(NamedTuple):
    """What an E says, nats, and how fast it was drawn."""

    estimates: dict[str, float]
    tokens: int
    seconds: float


def samplers() -> Iterator[Row]:
    """Yield a row for H, δH₁ and ΔH each, and one for the speed; none without SmolLM2's run or vLLM."""
    python = os.environ.get(PYTHON, "")
    if not (SMOLLM2.exists() and python):
        return
    with tempfile.TemporaryDirectory() as store:
        values = load_config("configs/smollm2.yaml").model_dump(mode="json")
        values["batch_config"] |= {"E_replicates": 1, "E_total_sequences": SEQUENCES}
        values["execution"] |= {"artifacts": store, "vllm_python": python}
        update = until_update(values)
        found: dict[str, list[Drawn]] = defaultdict(list)
        for seed in range(1, SEEDS + 1):
            for sampler in ("exact", "vllm"):
                found[sampler].append(_drawn(values, update, sampler, seed))
    for what in found["exact"][0].estimates:
        ours, theirs = ([one.estimates[what] for one in found[sampler]] for sampler in ("vllm", "exact"))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]  # both use the same random numbers
        error = statistics.stdev(differences) / SEEDS**0.5
        yield Row(
            f"SmolLM2 LoRA run, {SEEDS} seeds of {SEQUENCES} sequences: {what}, E drawn by vLLM; distance in its SE",
            f"{statistics.fmean(ours):.6g}",
            f"{statistics.fmean(theirs):.6g}, E drawn exactly; SE of the difference {error:.3g}",
            abs(statistics.fmean(differences)) / error,
            "≤ 3",
        )
    speed = {name: sum(o.tokens for o in of[1:]) / sum(o.seconds for o in of[1:]) for name, of in found.items()}
    yield Row(
        f"SmolLM2 LoRA run, {SEQUENCES} sequences at a time: E drawn by vLLM, after the first",
        f"{speed['vllm']:.0f} tokens/s",
        f"{speed['exact']:.0f} tokens/s, drawn exactly",
        speed["vllm"] / speed["exact"],
    )


def _drawn(values: Mapping[str, Any], update: UntilUpdate, sampler: str, seed: int) -> Drawn:
    """Draw an E and measure the step on it."""
    config = parse_config(values | {"generation": values["generation"] | {"sampler": sampler}})
    policy, proposal = sampler_of(config, update.policy)
    stages = StagesOf(update.checkpoint, config, update.run)
    (pool,), (step,) = (update.artifacts[name][:1] for name in ("load-prompts", "compute-update"))
    inputs = sampled_e(config, policy, pool, seed) | {"proposal": proposal}
    started = time.perf_counter()
    sequences = stages.sample(stage.SAMPLE_E, SEQUENCES, inputs)
    seconds = time.perf_counter() - started
    scores = stages.score(stage.SCORE_E, update.policy, sequences)
    of_e = [{"policy": update.policy, "update": step, "sequences": shard} for shard in sequences]
    along_v = {"half_width": 0.0, "arithmetic": "full"}
    derivatives = stages.over_shards(stage.FIRST_ORDER_E, [inputs | along_v for inputs in of_e])
    lr = update.learning_rate
    shards = stages.over_shards(stage.IMPORTANCE, [inputs | {"eta": lr} for inputs in of_e])
    batch, _ = evaluation_batch(scores, derivatives, "time_loo", "sequence")
    tokens = [read_tokens([shard]) for shard in scores]
    moved = moved_batch({"eta": lr, "eta_over_lr": 1.0, "shards": shards, "path": []}, tokens)
    totals = (batch.columns[functional].total_N for functional in (ENTROPY, LENGTH))
    change = change_of(batch, measured(batch, moved, "per_decision"), lr, "per_decision", "per_token")
    estimates = {
        "H": entropy(*totals, "per_token").value,
        "δH₁": lr * entropy_derivative(batch.columns, "per_token").value,
        "ΔH": change.value,
    }
    return Drawn(estimates, sum(len(read_sequences(shard).response_tokens_K) for shard in sequences), seconds)
