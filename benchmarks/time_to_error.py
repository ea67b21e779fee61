"""SE² times seconds, for δH₁ and for ΔH at five step sizes on one E batch: our defaults against the predecessor's.

On all cores by the clock on the wall, and on one thread by that of the processor: what is bound by memory gains less
from a second core than what is bound by arithmetic.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import predecessor
from benchmarks.common import Row, Run, take_turns
from benchmarks.ideas import ideas
from benchmarks.reasons import by_profile
from entropy_core.config.read import load_config, parse_config
from entropy_core.demo.run import main as make_demo_run
from entropy_core.estimates import rows as estimates
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.execution import Execution
from entropy_core.numerics import ragged
from entropy_core.numerics.functional import TokenPair, Tokens
from entropy_core.numerics.uncertainty import entropy_derivative
from entropy_core.pipeline.loading import load_checkpoint, load_pool
from entropy_core.pipeline.measure import Measurement
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner, direct_runner
from entropy_core.pipeline.sweep import execution_for
from entropy_core.policy import moves
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import BatchedSequences, LogprobResults
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Store

ETAS = (0.25, 0.5, 1.0, 2.0, 3.0)
DEMO: dict[str, Any] = {
    "name": "benchmark",
    "checkpoints": ["artifacts/demo-run/checkpoint-*"],
    "batch_config": {"E_total_sequences": 1024, "B_U": 64, "G": 8, "dataset_name": "arithmetic"},
    "generation": {"max_new_tokens": 32},
    "update": {"reward": "arithmetic"},
}
SMOLLM2 = Path("artifacts/smollm2/run")
PROFILED = 32  # sequences


def time_to_error() -> Iterator[Row]:
    """The demo run."""
    make_demo_run(["--out", "artifacts/demo-run"])
    yield from _compared("demo run, 1,024 sequences", DEMO, rounds=3)


def time_to_error_smollm2() -> Iterator[Row]:
    """SmolLM2's LoRA run, where `make sweep-smollm2` has left it."""
    if SMOLLM2.exists():
        config = load_config("configs/smollm2.yaml").model_dump(mode="json")
        config["batch_config"]["E_replicates"] = 1
        yield from _compared("SmolLM2 LoRA run, 128 sequences", config, rounds=1)


class _Enough(Exception):
    """The rest of the stages is not needed."""


class UntilUpdate(NamedTuple):
    """The artifacts of the last checkpoint up to the update, by stage; its policy, and how more is run on it."""

    artifacts: dict[str, list[Artifact]]
    checkpoint: str
    policy: PolicySpec
    learning_rate: float
    execution: Execution
    run: Runner


def _compared(name: str, values: dict[str, Any], rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as store:
        values = values | {"execution": {"artifacts": store}, "importance": {"etas": [1], "estimators": ["snis"]}}
        update = until_update(values)
        found, processor = update.artifacts, processor_of(update.policy, update.execution)
        policy, batch = processor.policy, read_sequences(found["sample-e-batch"][0])
        learning_rate = update.learning_rate
        v = dict(found["compute-update"][0].vector("direction"))

        def ours(batch: BatchedSequences) -> dict[Any, Any]:
            base, _ = processor.score(batch)
            found: dict[Any, Any] = {"base": base, "derivatives": forward_mode(processor, batch, v)}
            for eta in ETAS:
                with moves.moved(policy, v, eta * learning_rate):
                    found[eta], _ = processor.score(batch)
            return found

        of_ours = ours(batch)
        sums_N = ragged.sequence_sum(of_ours["base"].entropies_K, batch.response_offsets_N1)  # its sampler left them

        def theirs(batch: BatchedSequences) -> None:
            predecessor.entropy_gradient(policy, batch, sums_N[: len(batch)])
            for eta in ETAS:
                predecessor.scored(policy, batch)
                with moves.moved(policy, v, eta * learning_rate):
                    predecessor.scored(policy, batch)

        few = batch.select(torch.arange(min(PROFILED, len(batch))))
        why = cache(lambda: _why(partial(ours, few), partial(theirs, few), few))
        errors = list(_errors(of_ours, learning_rate))
        runs, cores = {"ours": partial(ours, batch), "theirs": partial(theirs, batch)}, torch.get_num_threads()
        for threads, unit, clock in ((cores, "seconds", time.perf_counter), (1, "CPU seconds", time.process_time)):
            torch.set_num_threads(threads)
            taken = take_turns(runs, rounds, clock)
            cost = {who: statistics.median(times) for who, times in taken.items()}
            yield from _rows(f"{name}, {threads} thread{'s' * (threads > 1)}", unit, cost, errors, why)
        torch.set_num_threads(cores)
        yield from ideas(name, batch, _tokens(of_ours), learning_rate, ours)


def _rows(
    name: str, unit: str, cost: dict[str, float], errors: list[tuple[str, float, float]], why: Callable[[], str]
) -> Iterator[Row]:
    """What both ways cost, and what they cost for the same error."""
    ours, theirs = cost["ours"], cost["theirs"]
    against = f"{theirs:.1f} s, the predecessor's recipe"
    yield Row(f"{name}: {unit} for δH₁ and {len(ETAS)} η", f"{ours:.1f} s", against, ours / theirs)
    for what, mine, other in errors:
        ours_then, theirs_then = mine**2 * ours, other**2 * theirs
        yield Row(
            f"{name}: SE² × {unit} of {what}",
            f"{ours_then:.3g} (SE {mine:.3g})",
            f"{theirs_then:.3g} (SE {other:.3g}), the predecessor's recipe",
            theirs_then / ours_then,
            "≥ 10",
        ).because(why)


def _why(ours: Run, theirs: Run, batch: BatchedSequences) -> str:
    """One reason for all that is compared on a batch: the standard errors are in the rows."""
    prompt, response = (len(tokens) / len(batch) for tokens in (batch.prompt_tokens, batch.response_tokens_K))
    found = by_profile(ours, theirs, f"{len(batch)} of its sequences")
    return f"{found}; both recipes take the trunk over prompts of {prompt:.0f} tokens and answers of {response:.0f}"


def until_update(values: dict[str, Any]) -> UntilUpdate:
    """Run the stages of the last checkpoint up to the update."""
    config = parse_config(values)
    checkpoint = preflight(config)[-1]
    execution = execution_for(config, [checkpoint])
    plain, found = direct_runner(Store(config.store_root), execution), defaultdict(list)

    def noted(stage: Any, inputs: Any, label: str) -> Artifact:
        artifact = plain(stage, inputs, label)
        found[stage.name].append(artifact)
        if stage.name == "compute-update":
            raise _Enough
        return artifact

    run = Runner(noted)
    pools = {split: load_pool(config, split, checkpoint.tokenizer, run) for split in set(config.splits)}
    measurement = Measurement(config, checkpoint, load_checkpoint(config, checkpoint, run), pools, run)
    with suppress(_Enough):
        measurement.variance_inputs()
    learning_rate = found["load-checkpoint"][0].summary["learning_rate"]
    return UntilUpdate(found, checkpoint.name, measurement.policy, learning_rate, execution, Runner(plain))


def _errors(found: dict[str, Any], learning_rate: float) -> Iterator[tuple[str, float, float]]:
    """Standard errors given U, per token, of both ways on the same batch."""
    tokens = _tokens(found)
    batch = EvaluationBatch.of([lambda: tokens], None, "time_loo")
    theirs = predecessor.derivative(tokens.entropies_K, *found["derivatives"][2:], tokens.offsets_N1, "per_token")
    ours = entropy_derivative(batch.columns, "per_token")
    yield "δH₁ at the learning rate", *(learning_rate * batch.standard_error(x) for x in (ours, theirs))
    for eta in ETAS:
        step, moved_tokens = eta * learning_rate, MovedTokens(found[eta].logprobs_K, found[eta].entropies_K)
        errors = []
        for estimator in ("per_decision", "snis"):
            there = measured(batch, Moved(step, lambda block=moved_tokens: [block]), estimator)
            errors.append(batch.standard_error(estimates.change_of(batch, there, step, estimator, "per_token")))
        yield f"ΔH at η = {eta:g} lr", *errors


def _tokens(found: dict[str, Any]) -> Tokens:
    """ℓ and h of E, and their derivatives."""
    base: LogprobResults = found["base"]
    return Tokens(base.logprobs_K, base.entropies_K, base.offsets_N1, TokenPair(*found["derivatives"][2:]))
