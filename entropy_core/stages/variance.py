"""variance: estimates with intervals, from cached per-token columns alone. No model, no parameter-sized file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from entropy_core import estimates
from entropy_core.errors import NonFiniteError
from entropy_core.estimates import EvaluationBatch, Row
from entropy_core.numerics import first_order, importance, uncertainty
from entropy_core.numerics.first_order import Baseline
from entropy_core.numerics.uncertainty import Normalization
from entropy_core.stages.columns import read_columns
from entropy_core.tables import ESTIMATES, to_table

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

_ATTRIBUTION = ("inner_product", "momentum", "decay", "closure")


def variance(
    out: "Writer",
    execution: "Execution",
    *,
    learning_rate: float,
    scores: "Sequence[Artifact]",
    rescores: "Sequence[Artifact]",
    first_order_e: "Sequence[Artifact]",
    first_order_u: "Artifact",
    update: "Artifact",
    moved: "Sequence[Mapping[str, Any]]",
    estimators: Sequence[importance.Estimator],
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> Row:
    """All estimates of one checkpoint.

    Args:
        out: `estimates.parquet` (a row per η, normalisation and estimator; schema `tables.ESTIMATES`).
        execution: not used.
        learning_rate: nominal, to express η in.
        scores: the shards of score-e-batch.
        rescores: the draws of rescore-e-batch on the first sequences, for the numerical noise.
        first_order_e: the shards of first-order-e.
        first_order_u: artifact of first-order-u.
        update: artifact of compute-update; only its summary is read.
        moved: a mapping per step size: `eta`, and the `shards` of importance (none for η = 0).
        estimators: of ΔH.
        normalizations: of the entropy.
        baseline: of the reward-to-go.
        units: what is independent in E.
        confidence_level: of the intervals.

    Returns:
        Number of rows.

    Raises:
        NonFiniteError: a batch is too small for a standard error.
    """
    batch, of_sequences = _read_batch(scores, first_order_e, baseline, units)
    rescored = [read_columns([draw], "logprobs", "entropies")[0] for draw in rescores]
    at_theta = {"logprobs": batch.logprobs_K, "entropies": batch.entropies_K}
    at_eta = [
        (entry["eta"], read_columns(entry["shards"], "logprobs", "entropies")[0] if entry["shards"] else at_theta)
        for entry in moved
    ]
    contributions = first_order_u.table("sequences.parquet")
    of_update = _describe_update(update.summary)
    quantile = uncertainty.normal_quantile(confidence_level)
    rows = []
    for normalization in normalizations:
        contributions_N = torch.tensor(contributions[f"influence_{normalization}"].to_pylist(), dtype=torch.float64)
        derivative = estimates.derivative_of(
            batch, baseline, normalization, contributions_N.view(of_update["n_prompts_u"], -1)
        )
        attribution = {name: first_order_u.summary[name][normalization] for name in _ATTRIBUTION}
        inner_product = attribution["inner_product"]
        same_baseline = batch.columns(first_order_u.summary["baseline"])
        backward_check = uncertainty.entropy_derivative(same_baseline, normalization).value
        noise = estimates.numerical_noise(batch, rescored, normalization)
        of_batch = (
            of_sequences
            | estimates.describe_batch(batch, normalization)
            | estimates.describe_influence(derivative.estimate)
        )
        for eta, columns in at_eta:
            noise_floor = noise if eta else 0.0
            for estimator in estimators:
                row = {
                    "eta": eta,
                    "eta_over_lr": eta / learning_rate,
                    "learning_rate": learning_rate,
                    "normalization": normalization,
                    "estimator": estimator,
                    "inner_product": inner_product * eta,
                    "delta_h1_momentum": attribution["momentum"] * eta,
                    "delta_h1_decay": attribution["decay"] * eta,
                    "attribution_closure": attribution["closure"],
                    "gradient_check": _relative_difference(inner_product, backward_check),
                    "noise_floor": noise_floor,
                }
                row |= of_batch | of_update | estimates.predict(derivative, eta, confidence_level)
                row |= estimates.measure(
                    batch, columns, derivative, eta, estimator, normalization, noise_floor, quantile
                )
                rows.append(row)
    _require_numbers(rows)
    out.table(to_table(rows, ESTIMATES), "estimates.parquet")
    return {"rows": len(rows)}


def _read_batch(
    scores: "Sequence[Artifact]", derivatives: "Sequence[Artifact]", baseline: Baseline, units: str
) -> tuple[EvaluationBatch, Row]:
    scored, offsets_N1 = read_columns(scores, "logprobs", "entropies")
    along_v, _ = read_columns(derivatives, "dlogprobs", "dentropies")
    tables = [shard.table("scores.parquet") for shard in scores]
    prompt_ids_N = torch.tensor([prompt for table in tables for prompt in table["prompt_id"].to_pylist()])
    reasons = [reason for table in tables for reason in table["finish_reason"].to_pylist()]
    batch = EvaluationBatch(
        scored["logprobs"],
        scored["entropies"],
        along_v["dlogprobs"],
        along_v["dentropies"],
        offsets_N1,
        first_order.baselines(
            first_order.returns_to_go(scored["entropies"], offsets_N1), offsets_N1, baseline, along_v["dlogprobs"]
        ),
        prompt_ids_N if units == "prompt" else None,
    )
    return batch, {"n_sequences": len(reasons), "truncated_fraction": reasons.count("length") / len(reasons)}


def _describe_update(summary: Mapping[str, Any]) -> Row:
    prompts = summary["prompts"]
    return {name: summary[name] for name in ("gradient_norm", "clip_factor", "update_norm", "mean_reward")} | {
        "n_prompts_u": prompts,
        "equal_reward_fraction": summary["prompts_with_equal_rewards"] / prompts,
    }


def _relative_difference(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _require_numbers(rows: Sequence[Row]) -> None:
    for row in rows:
        bad = [name for name, value in row.items() if isinstance(value, float) and value != value]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} came out as NaN at eta = {row['eta']:g}",
                cause="fewer than two independent units: sequences of E, prompts of U, or clusters",
                way_out="take a larger batch, or variance.cluster: auto",
            )
