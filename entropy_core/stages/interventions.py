"""interventions: what each intervention does to the change of the entropy, with paired errors and a verdict."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from entropy_core.estimates import interventions as estimates
from entropy_core.estimates import measurement
from entropy_core.estimates.batches import evaluation_batch, moved_batch
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.interventions import Predicted, Row, Screened, Settings
from entropy_core.estimates.price import NO_REWARD, OnE, difference_columns, reward_change
from entropy_core.estimates.rows import change_of
from entropy_core.estimates.tables import INTERVENTIONS, to_table
from entropy_core.numerics.block_estimates import Blocks, Error
from entropy_core.numerics.choices import Baseline, Normalization
from entropy_core.numerics.functional import REWARD
from entropy_core.numerics.halves import KINDS
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer
    from entropy_core.store.inputs import (
        AlongV,
        AtStepSize,
        HalfSteps,
        MeasuredIntervention,
        PredictedIntervention,
        RewardsOfE,
        ScoresOfE,
        Screen,
        Update,
    )


def interventions(
    out: "Writer",
    execution: "Execution",
    *,
    checkpoint: str,
    step: int,
    learning_rate: float,
    scores: "Sequence[ScoresOfE]",
    first_order_e: "Sequence[AlongV]",
    half_steps_u: "HalfSteps",
    update: "Update",
    screen: "Screen",
    predicted: "Sequence[PredictedIntervention]",
    measured: "Sequence[MeasuredIntervention]",
    rewards: "Sequence[RewardsOfE]",
    margin: float,
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> dict[str, Any]:
    """Compare every intervention with the run as it is, from cached columns alone.

    Args:
        out: writer of `interventions.parquet` (schema `tables.INTERVENTIONS`), by falling difference within a level.
        execution: unused.
        checkpoint: its name.
        step: the trainer's global step.
        learning_rate: nominal learning rate: the step that is taken.
        scores: shards of score-e-batch.
        first_order_e: shards of first-order-e.
        half_steps_u: artifact of half-steps-u, which knows whether the optimizer has made a step.
        update: artifact of compute-update, of which only the summary is read.
        screen: artifact of screen.
        predicted: artifacts of predict, the first of them of the run as it is; empty: none.
        measured: shards of importance after the step under an intervention, the first of them of the run as it is.
        rewards: shards of reward-e-batch; none: nothing is said of the expected reward.
        margin: share of |δH₁| of the run within which a difference is none that matters.
        normalizations: per token, per sequence, or both.
        baseline: baseline of the return-to-go in ΔH.
        units: independent units of E.
        confidence_level: of intervals and verdicts.

    Returns:
        Summary: number of rows, what could not be tried and why, and the number of those that act.
    """
    informative = update.summary["prompts"] - update.summary["prompts_with_equal_rewards"]
    settings = Settings(learning_rate, confidence_level, margin, informative, half_steps_u.summary["fresh"])
    screened = _screened(screen)
    predictions = {entry["label"]: entry["predicted"].summary["predictions"][entry["label"]] for entry in predicted}
    clip_of = {label: prediction["clip_factor"] for label, prediction in predictions.items()}
    as_taken = screened
    if clip_of:
        as_taken = screened.clipped(torch.tensor([clip_of[label] for label in screened.labels], dtype=torch.float64))
    known = [] if any(shard.summary["open"] for shard in rewards) else rewards
    batch = evaluation_batch(scores, first_order_e, baseline, units, known)[0] if measured else None
    changes = _changes(batch, scores, measured, learning_rate, normalizations, confidence_level) if batch else {}
    of_reward = _predicted_rewards(predictions, screened.halves, learning_rate)
    rows: list[Row] = []
    for normalization in normalizations:
        of_screen = estimates.screen_rows(screened, settings, normalization)
        levels = [of_screen]
        if predicted:
            levels.append(estimates.predict_rows(as_taken, _exact(predicted), settings, normalization))
        if changes:
            of_measured = {label: found.of_entropy for label, found in changes[normalization].items()}
            levels.append(estimates.measure_rows(as_taken, of_measured, settings, normalization))
        base = of_screen[0]["delta_h1"]
        for of_level in levels:
            rows += [
                {"checkpoint": checkpoint, "step": step, "normalization": normalization}
                | {"confidence_level": confidence_level}
                | (changes[normalization][row["intervention"]].of_reward if row["level"] == "measure" else NO_REWARD)
                | (of_reward.get(row["intervention"], {}) if row["level"] == "predict" else {})
                | row
                for row in estimates.with_verdicts(of_level, screened.labels[0], base, settings)
            ]
    out.table(to_table(rows, INTERVENTIONS), "interventions.parquet")
    acting = {row["intervention"] for row in rows if row["verdict"] == "acts"}
    return {"rows": len(rows), "skipped": screen.summary["skipped"], "acting": len(acting)}


def _predicted_rewards(
    predictions: Mapping[str, Mapping[str, Any]], halves: Sequence[Mapping[str, Any]], learning_rate: float
) -> dict[str, Row]:
    """δJ₁ of the exact step under each intervention, and its difference from that of the run, by label."""
    counts = [half["sequences"] for half in halves]
    found: dict[str, float] = {}
    for label, prediction in predictions.items():
        if products := prediction["reward"]:
            mean = sum(n * x for n, x in zip(counts, products, strict=True)) / sum(counts)
            found[label] = learning_rate * mean
    of_run = next(iter(found.values()), 0.0)
    return {label: {"delta_j": value, "difference_j": value - of_run} for label, value in found.items()}


def _screened(screen: "Artifact") -> Screened:
    tensors, summary = screen.tensors("screen.safetensors"), screen.summary
    return Screened(
        labels=[entry["label"] for entry in summary["interventions"]],
        second_half=[entry["on_second_half"] for entry in summary["interventions"]],
        product_IKH=tensors["product"],
        gradient_IKH=tensors["gradient"],
        clip_I=torch.tensor([entry["clip_factor"] for entry in summary["interventions"]], dtype=torch.float64),
        saturation_I=torch.tensor(
            [torch.nan if entry["kept_on"] is None else entry["kept_on"] for entry in summary["interventions"]],
            dtype=torch.float64,
        ),
        kept_on_IKH=tensors["kept_on"],
        influence_IKHP=tensors["influence"],
        halves=summary["halves"],
    )


def _exact(predicted: "Sequence[PredictedIntervention]") -> Predicted:
    """What the exact steps say; all of them on the same blocks of E."""
    along = {}
    for entry in predicted:
        products = entry["predicted"].summary["predictions"][entry["label"]]["products"]
        along[entry["label"]] = torch.tensor([products[kind] for kind in KINDS], dtype=torch.float64)
    return Predicted(along, Blocks.from_summaries(predicted[0]["predicted"].summary["blocks"]))


class _Measured(NamedTuple):
    """ΔH, its difference from that of the run and the error of it over E; and the columns on the reward."""

    of_entropy: tuple[float, float, Error]
    of_reward: Row


def _changes(
    batch: EvaluationBatch,
    scores: "Sequence[Artifact]",
    measured: Sequence[Mapping[str, Any]],
    learning_rate: float,
    normalizations: Sequence[Normalization],
    confidence_level: float,
) -> dict[Normalization, dict[str, _Measured]]:
    """What was measured on E under each intervention, by normalisation and label; the first is the run as it is."""
    sequences = [read_tokens([shard]) for shard in scores]
    on_e = OnE(batch, confidence_level)
    found: dict[Normalization, dict[str, _Measured]] = {of: {} for of in normalizations}
    run: dict[Normalization, tuple[Estimate, Estimate | None]] = {}
    for entry in measured:
        at_eta: AtStepSize = {"eta": learning_rate, "eta_over_lr": 1.0, "shards": entry["shards"], "path": []}
        terms = measurement.measured(batch, moved_batch(at_eta, sequences), "per_decision")
        rewarded = REWARD in batch.functionals and terms.usable
        reward = reward_change(batch, terms, learning_rate, "per_decision") if rewarded else None
        for normalization, of_label in found.items():
            change = change_of(batch, terms, learning_rate, "per_decision", normalization)
            of_run, reward_of_run = run.setdefault(normalization, (change, reward))
            difference = change.minus(of_run)
            error = Error(batch.standard_error(difference), float(batch.units - 1))
            columns = NO_REWARD
            if reward and reward_of_run:
                columns = difference_columns(on_e, difference, reward, reward_of_run)
            of_label[entry["label"]] = _Measured((change.value, difference.value, error), columns)
    return found
