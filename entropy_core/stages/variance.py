"""variance: estimates with intervals from cached per-token columns, without model or parameter-sized files."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
import torch

from entropy_core.errors import NonFiniteError
from entropy_core.estimates import derivative_error, diagnostics, measurement, sampler, second_order, unseen
from entropy_core.estimates import rows as estimates
from entropy_core.estimates.batches import evaluation_batch, halves_of_u, influences, moved_batch, rescored_batch
from entropy_core.estimates.estimate_columns import ESTIMATES
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured
from entropy_core.estimates.rows import Contributions, Derivative, Row
from entropy_core.estimates.tables import TABLES, to_table
from entropy_core.numerics import half_samples, uncertainty
from entropy_core.numerics.choices import Baseline, Estimator, Normalization
from entropy_core.numerics.functional import ENTROPY
from entropy_core.numerics.second_order import Observation, SecondOrder, combine
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer
    from entropy_core.store.inputs import (
        AlongV,
        AtStepSize,
        Attribution,
        Calibration,
        Discriminators,
        HalfSteps,
        Replicate,
        Rescores,
        ScoresOfE,
        ScoresOfU,
        Update,
    )


def variance(
    out: "Writer",
    execution: "Execution",
    *,
    learning_rate: float,
    max_new_tokens: int,
    scores: "Sequence[ScoresOfE]",
    rescores: "Sequence[Rescores]",
    first_order_e: "Sequence[AlongV]",
    first_order_u: "Attribution",
    half_steps_u: "HalfSteps",
    update: "Update",
    scores_u: "Sequence[ScoresOfU]",
    discriminators_u: "Discriminators",
    calibration: "Calibration | None",
    moved: "Sequence[AtStepSize]",
    seed: int,
    replicates: "Sequence[Replicate]",
    estimators: Sequence[Estimator],
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> Row:
    """Compute all estimates of one checkpoint.

    Args:
        out: writer of `estimates.parquet` (one row per η, normalisation and estimator; schema
            `estimate_columns.ESTIMATES`), and of the tables of `tables.TABLES`.
        execution: unused.
        learning_rate: nominal learning rate.
        max_new_tokens: maximum response length of E.
        scores: shards of score-e-batch.
        rescores: draws of rescore-e-batch on the first sequences, for the numerical noise.
        first_order_e: shards of first-order-e.
        first_order_u: artifact of first-order-u.
        half_steps_u: artifact of half-steps-u.
        update: artifact of compute-update, of which only summary and advantages are read.
        scores_u: shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        calibration: artifact of calibrate, unless derivatives are those of forward mode in full precision.
        moved: one mapping per step size: `eta`, the `shards` of importance, and the shards of path-integral in `path`.
        seed: seed of E.
        replicates: one mapping per further E batch: `seed`, `scores` and `first_order_e`.
        estimators: estimators of ΔH.
        normalizations: normalisations of the entropy.
        baseline: baseline of the return-to-go.
        units: independent units of E.
        confidence_level: confidence level of the intervals.

    Returns:
        Summary: number of rows of each table.

    Raises:
        NonFiniteError: a batch is too small for a standard error.
    """
    batch, of_batch = evaluation_batch(scores, first_order_e, baseline, units)
    of_batch |= sampler.describe_sampler(batch)
    largest = math.log(scores[0].summary["vocabulary"])
    H_seq = float(batch.columns[ENTROPY].total_N.mean())
    of_batch |= unseen.describe_unseen(unseen.unseen_of(scores, max_new_tokens), len(batch), H_seq, largest)
    invalid_over_e = sampler.unusable(of_batch) or unseen.cannot_know(of_batch, len(batch))
    of_batch |= _describe_update(update.summary)
    of_batch |= {"learning_rate": learning_rate, **derivative_error.describe(calibration)}
    of_u, of_sequences = first_order_u.summary, first_order_u.table("sequences.parquet")
    as_backward = batch
    if of_u["baseline"] != baseline:
        as_backward, _ = evaluation_batch(scores, first_order_e, of_u["baseline"], units)
    sequences = [read_tokens([shard]) for shard in scores]
    again, rescored = rescored_batch(batch, sequences, rescores)
    common: dict[Normalization, _Common] = {}
    for normalization in normalizations:
        steps = _half_steps(half_steps_u, of_u["inner_product"][normalization], normalization)
        contributions = _contributions(of_sequences, normalization, update.summary, steps)
        error = derivative_error.derivative_error(batch, calibration, sequences, normalization)
        numerical = error.size if error else 0.0
        derivative = estimates.derivative_of(batch, normalization, contributions, invalid_over_e, numerical)
        columns = of_batch | {
            "normalization": normalization,
            "attribution_closure": of_u["closure"][normalization],
            "gradient_check": _gradient_check(as_backward, of_u, normalization),
            **diagnostics.describe_batch(batch, normalization),
            **diagnostics.describe_influence(derivative.estimate),
        }
        per_unit = {f"delta_h1_{part}": of_u[part][normalization] for part in ("momentum", "decay", "rounding")}
        per_unit |= {"inner_product": of_u["inner_product"][normalization]}
        noise = diagnostics.numerical_noise(again, rescored, normalization)
        common[normalization] = _Common(derivative, columns, per_unit, noise, error)
    changes: dict[tuple[Normalization, Estimator], list[_Step]] = {}
    seen: dict[Normalization, list[Observation]] = {normalization: [] for normalization in normalizations}
    for entry in moved:
        eta, multiple = entry["eta"], entry["eta_over_lr"]
        both: list[Estimator] = [*estimators, "per_decision"] if entry["shards"] else [*estimators]
        of_entry = moved_batch(entry, sequences)
        for estimator in dict.fromkeys(both):
            there = measurement.measured(batch, of_entry, estimator)
            for of, shared in common.items():
                change = estimates.change_of(batch, there, eta, estimator, of)
                if estimator in estimators:
                    of_rows = there._replace(columns=None)  # of no use any more, and large
                    changes.setdefault((of, estimator), []).append(_Step(eta, multiple, of_rows, change))
                if estimator in ("per_decision", "path_integral"):
                    slope = shared.derivative.estimate
                    rounding = math.hypot(shared.noise / 2, shared.derivative.numerical * eta)
                    seen[of] += second_order.observations(batch, there, change, slope, eta, of, rounding)
    found: dict[tuple[Normalization, Estimator], list[tuple[Row, Estimate]]] = {}
    for of, shared in common.items():
        second = combine(seen[of], shared.derivative.estimate.value) if seen[of] else None
        for estimator in estimators:
            found[of, estimator] = [
                (_row(batch, step, estimator, shared, second, confidence_level), step.change)
                for step in changes[of, estimator]
            ]
    by_seed = {seed: _values(batch, normalizations)}
    for another in replicates:
        replicate, _ = evaluation_batch(another["scores"], another["first_order_e"], baseline, units)
        by_seed[another["seed"]] = _values(replicate, normalizations)

    tables: dict[str, list[Row]] = {name: [] for name in TABLES}

    def add(name: str, normalization: Normalization, rows: list[Row]) -> None:
        tables[name] += [{"normalization": normalization} | row for row in rows]

    multiples = {entry["eta"]: entry["eta_over_lr"] for entry in moved}
    by_literature = _by_literature(scores_u, discriminators_u, update)
    for (normalization, estimator), at_etas in found.items():
        usable = {
            row["eta"]: (change, row["noise_floor"])
            for row, change in at_etas
            if row["verdict"] != "weights-unreliable"
        }
        derivative = common[normalization].derivative
        fits, pairs = diagnostics.linearity_rows(batch, usable, derivative, estimator, multiples)
        add("linearity", normalization, fits)
        add("eta_pairs", normalization, pairs)
        for row, _ in at_etas if estimator == estimators[0] else ():
            if row["eta"]:
                on_other_e = [values[normalization][0] for other, values in by_seed.items() if other != seed]
                add("predictors", normalization, diagnostics.predictor_rows(row, by_literature, on_other_e))
    for normalization in normalizations:
        of_seed = {seed: values[normalization] for seed, values in by_seed.items()}
        add("replicates", normalization, diagnostics.replicate_rows(of_seed, learning_rate))
    rows = [row for at_etas in found.values() for row, _ in at_etas]
    _require_numbers(rows)
    out.table(to_table(rows, ESTIMATES), "estimates.parquet")
    for name, schema in TABLES.items():
        out.table(to_table(tables[name], schema), f"{name}.parquet")
    return {"rows": len(rows)} | {name: len(of_table) for name, of_table in tables.items()}


class _Common(NamedTuple):
    """Values shared by all rows of one normalisation; those in `per_unit` are multiplied by η."""

    derivative: Derivative
    columns: Row
    per_unit: dict[str, float]
    noise: float
    error: derivative_error.DerivativeError | None


class _Step(NamedTuple):
    """ΔH at one step size by one estimator, and the weights that it was measured with."""

    eta: float
    eta_over_lr: float
    terms: Measured
    change: Estimate


def _row(
    batch: EvaluationBatch,
    step: _Step,
    estimator: Estimator,
    common: _Common,
    second: SecondOrder | None,
    confidence_level: float,
) -> Row:
    (eta, multiple, there, change), derivative = step, common.derivative
    measurable = change if there.usable else None
    noise_floor = common.noise if eta else 0.0
    if estimator == "path_integral":  # it subtracts nothing, and has the error of its derivatives
        noise_floor = 2.0 * derivative.numerical * abs(eta)
    return {
        **common.columns,
        "eta": eta,
        "eta_over_lr": multiple,
        "estimator": estimator,
        **{name: value * eta for name, value in common.per_unit.items()},
        "noise_floor": noise_floor,
        **derivative_error.of_step(common.error, eta),
        **estimates.predict(derivative, eta, confidence_level),
        **second_order.predict(batch, derivative, second, eta, confidence_level),
        **estimates.measure(batch, change, there, derivative, eta, estimator, noise_floor, confidence_level),
        **second_order.remainder(batch, measurable, derivative, second, eta, noise_floor),
    }


def _values(
    batch: EvaluationBatch, normalizations: Sequence[Normalization]
) -> dict[Normalization, tuple[float, float]]:
    """Return ∂_vH and its standard error given U."""
    found = {of: uncertainty.entropy_derivative(batch.columns, of) for of in normalizations}
    return {of: (estimate.value, batch.standard_error(estimate)) for of, estimate in found.items()}


def _contributions(
    of_sequences: pa.Table, normalization: Normalization, update: Mapping[str, Any], steps: half_samples.HalfSteps
) -> Contributions:
    prompts = update["prompts"]
    informative = prompts - update["prompts_with_equal_rewards"]
    return Contributions(*influences(of_sequences, normalization, prompts), steps, informative)


def _half_steps(artifact: "HalfSteps", value: float, normalization: Normalization) -> half_samples.HalfSteps:
    of_splits = halves_of_u(artifact.table("halves.parquet"), normalization)
    return half_samples.half_steps(value, *of_splits, artifact.summary["fresh"], artifact.summary["no_interval"])


def _by_literature(
    scores_u: "Sequence[Artifact]", discriminators_u: "Artifact", update: "Artifact"
) -> dict[str, float]:
    of_u = read_tokens(scores_u, "logprobs", "entropies").join(read_tokens([discriminators_u], "expected"))
    advantages_N = torch.tensor(update.table("sequences.parquet")["advantage"].to_pylist(), dtype=torch.float64)
    return diagnostics.predicted_changes(
        of_u["logprobs"], of_u["entropies"], of_u["expected"], advantages_N, of_u.offsets_N1
    )


def _describe_update(summary: Mapping[str, Any]) -> Row:
    prompts = summary["prompts"]
    return {
        name: summary[name] for name in ("gradient_norm", "clip_factor", "update_norm", "moved_fraction", "mean_reward")
    } | {
        "n_prompts_u": prompts,
        "equal_reward_fraction": summary["prompts_with_equal_rewards"] / prompts,
    }


def _gradient_check(batch: EvaluationBatch, of_u: Mapping[str, Any], normalization: Normalization) -> float:
    """Compare ⟨∇H, v⟩ from the backward pass with forward mode, using the baseline of the backward pass."""
    a = of_u["inner_product"][normalization]
    b = uncertainty.entropy_derivative(batch.columns, normalization).value
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _require_numbers(rows: Sequence[Row]) -> None:
    for row in rows:
        bad = [name for name, value in row.items() if isinstance(value, float) and value != value]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} came out as NaN at eta = {row['eta']:g}",
                cause="fewer than two independent units: sequences of E, prompts of U, or clusters",
                fix="take a larger batch, or variance.cluster: auto",
            )
