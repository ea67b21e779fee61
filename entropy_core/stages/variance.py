"""variance: estimates with intervals, from cached per-token columns alone. No model, no parameter-sized file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from entropy_core import pareto
from entropy_core.errors import NonFiniteError
from entropy_core.numerics import first_order, importance, ragged, uncertainty
from entropy_core.numerics.first_order import Baseline, FirstOrderColumns, ReturnsToGo
from entropy_core.numerics.uncertainty import Estimate, Normalization
from entropy_core.numerics.verdicts import verdict
from entropy_core.stages.columns import read_columns
from entropy_core.tables import ESTIMATES, to_table

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

Row = dict[str, Any]
_ATTRIBUTION = ("inner_product", "momentum", "decay", "closure")


class EvaluationBatch(NamedTuple):
    """What is known of E at θ: per-token columns [K], baselines, and the units that count as independent."""

    logprobs_K: Tensor
    entropies_K: Tensor
    dlogprobs_K: Tensor
    dentropies_K: Tensor
    offsets_N1: Tensor
    base: ReturnsToGo
    clusters_N: Tensor | None

    def standard_error(self, estimate: Estimate) -> float:
        """Of an estimate on this batch, with the update held fixed."""
        return uncertainty.standard_error(estimate.influence_N, self.clusters_N)

    def first_tokens(self, count: int) -> "EvaluationBatch":
        """The sequences that make up the first `count` tokens."""
        sequences = int((self.offsets_N1 <= count).sum()) - 1
        return EvaluationBatch(
            logprobs_K=self.logprobs_K[:count],
            entropies_K=self.entropies_K[:count],
            dlogprobs_K=self.dlogprobs_K[:count],
            dentropies_K=self.dentropies_K[:count],
            offsets_N1=self.offsets_N1[: sequences + 1],
            base=ReturnsToGo(*(column_K[:count] for column_K in self.base)),
            clusters_N=None if self.clusters_N is None else self.clusters_N[:sequences],
        )

    @property
    def units(self) -> int:
        """Number of independent units."""
        return len(self.offsets_N1) - 1 if self.clusters_N is None else len(self.clusters_N.unique())

    def columns(self, baseline: Baseline) -> FirstOrderColumns:
        """Per-sequence terms of ∂_vH."""
        return first_order.first_order_columns(
            self.entropies_K, self.dlogprobs_K, self.dentropies_K, self.offsets_N1, baseline
        )


class Derivative(NamedTuple):
    """∂_vH for one normalisation, everything per unit step."""

    estimate: Estimate
    of_estimator: dict[importance.Estimator, Estimate]  # the exact derivative of each ΔH estimator at η = 0
    local: float
    jackknife: float
    se_given_u: float
    se_over_u: float
    units_e: int
    prompts_u: int


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
        rescores: the draws of rescore-e-batch on the first shard, for the numerical noise.
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
        derivative = _derivative(batch, baseline, normalization, contributions_N.view(of_update["n_prompts_u"], -1))
        attribution = {name: first_order_u.summary[name][normalization] for name in _ATTRIBUTION}
        inner_product = attribution["inner_product"]
        same_baseline = batch.columns(first_order_u.summary["baseline"])
        backward_check = uncertainty.entropy_derivative(same_baseline, normalization).value
        noise = _numerical_noise(batch, rescored, normalization)
        of_batch = of_sequences | _describe_batch(batch, normalization) | _describe_influence(derivative.estimate)
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
                row |= of_batch | of_update | _predict(derivative, eta, confidence_level)
                row |= _measure(batch, columns, derivative, eta, estimator, normalization, noise_floor, quantile)
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


def _derivative(
    batch: EvaluationBatch, baseline: Baseline, normalization: Normalization, contributions_PG: Tensor
) -> Derivative:
    columns = batch.columns(baseline)
    estimate = uncertainty.entropy_derivative(columns, normalization)
    mean_length = float(columns.T_N.mean()) if normalization == "per_token" else 1.0
    score_N = ragged.sequence_sum(batch.dlogprobs_K, batch.offsets_N1)
    weighted = first_order.weighted_columns(batch.entropies_K, batch.dlogprobs_K, batch.dentropies_K, batch.offsets_N1)
    return Derivative(
        estimate=estimate,
        of_estimator={
            "per_decision": estimate,
            "weighted_per_decision": uncertainty.entropy_derivative(weighted, normalization),
            "snis": uncertainty.snis_derivative(columns, score_N, normalization),
        },
        local=float(columns.x_local_N.mean()) / mean_length,
        jackknife=uncertainty.jackknife_standard_error(columns, normalization, batch.clusters_N),
        se_given_u=batch.standard_error(estimate),
        se_over_u=uncertainty.clustered_sum_standard_error(contributions_PG),
        units_e=batch.units,
        prompts_u=len(contributions_PG),
    )


def _predict(derivative: Derivative, eta: float, confidence_level: float) -> Row:
    """δH₁ = η·∂_vH with its standard errors and intervals."""
    total = uncertainty.total_standard_error(
        derivative.se_given_u, derivative.units_e, derivative.se_over_u, derivative.prompts_u
    )
    delta_h1 = derivative.estimate.value * eta
    tail = 0.5 + confidence_level / 2
    half_total = float(student.ppf(tail, total.degrees_of_freedom)) * total.standard_error * abs(eta)
    half_given_u = float(student.ppf(tail, derivative.units_e - 1)) * derivative.se_given_u * abs(eta)
    return {
        "delta_h1": delta_h1,
        "delta_h1_local": derivative.local * eta,
        "se_given_u": derivative.se_given_u * abs(eta),
        "se_given_u_jackknife": derivative.jackknife * abs(eta),
        "se_over_u": derivative.se_over_u * abs(eta),
        "se_total": total.standard_error * abs(eta),
        "ci_low": delta_h1 - half_total,
        "ci_high": delta_h1 + half_total,
        "ci_given_u_low": delta_h1 - half_given_u,
        "ci_given_u_high": delta_h1 + half_given_u,
        "confidence_level": confidence_level,
    }


def _change(
    batch: EvaluationBatch, moved: Mapping[str, Tensor], estimator: importance.Estimator, normalization: Normalization
) -> tuple[Estimate, importance.PrefixWeights]:
    """ΔH between the columns at θ and those at θ', paired on the batch; and the weights."""
    S_N = ragged.sequence_sum(batch.entropies_K, batch.offsets_N1)
    T_N = ragged.lengths(batch.offsets_N1).double()
    weights = importance.prefix_weights(batch.logprobs_K, moved["logprobs"], batch.offsets_N1)
    if estimator == "per_decision":
        columns = importance.per_decision_columns(weights, moved["entropies"], batch.base, batch.offsets_N1)
        there = uncertainty.moved_entropy(columns, normalization)
    elif estimator == "weighted_per_decision":
        columns = importance.weighted_per_decision_columns(weights, moved["entropies"], batch.offsets_N1)
        there = uncertainty.moved_entropy(columns, normalization)
    else:
        moved_S_N = ragged.sequence_sum(moved["entropies"], batch.offsets_N1)
        there = uncertainty.snis_entropy(weights.sequence_N, moved_S_N, T_N, normalization)
    return there.minus(uncertainty.entropy(S_N, T_N, normalization)), weights


def _numerical_noise(
    batch: EvaluationBatch, rescored: Sequence[Mapping[str, Tensor]], normalization: Normalization
) -> float:
    """Twice the root mean square of the ΔH that rounding alone makes, on the first sequences of the batch."""
    first = batch.first_tokens(len(rescored[0]["entropies"]))
    changes = [_change(first, columns, "per_decision", normalization)[0].value for columns in rescored]
    return 2.0 * (sum(change**2 for change in changes) / len(changes)) ** 0.5


def _measure(
    batch: EvaluationBatch,
    columns: Mapping[str, Tensor],
    derivative: Derivative,
    eta: float,
    estimator: importance.Estimator,
    normalization: Normalization,
    noise_floor: float,
    quantile: float,
) -> Row:
    """ΔH, its paired difference from δH₁, and what the row is worth."""
    change, weights = _change(batch, columns, estimator, normalization)
    if eta == 0:  # nothing changes: what is left is the rounding of sums in another order
        change = change.scaled(0.0)
    usable = importance.log_weights_are_usable(weights)
    ess = importance.effective_sample_size(weights.sequence_N) if usable else 0.0
    prediction = derivative.estimate.scaled(eta)
    difference = change.minus(prediction)
    curvature = change.minus(derivative.of_estimator[estimator].scaled(eta))
    measured = {
        "delta_h": change.value,
        "delta_h_se": batch.standard_error(change),
        "curvature": curvature.value,
        "curvature_se": batch.standard_error(curvature),
    }
    N = len(batch.offsets_N1) - 1
    k, k_threshold = pareto.pareto_k(weights.sequence_N) if usable and eta else None, pareto.threshold(N)
    word, rule = verdict(
        eta=eta,
        delta_h1=prediction.value,
        noise_floor=noise_floor,
        quantile=quantile,
        ess_fraction=ess / N,
        pareto_k=k,
        pareto_k_threshold=k_threshold,
        **measured,
    )
    measured |= {"paired_difference": difference.value, "paired_difference_se": batch.standard_error(difference)}
    return {
        **(measured if usable else dict.fromkeys(measured)),  # overflowed weights measure nothing: null
        "minimum_detectable": quantile * measured["delta_h_se"] + noise_floor if usable else None,
        "ess": ess,
        "ess_fraction": ess / N,
        "pareto_k": k,
        "pareto_k_threshold": k_threshold,
        "verdict": word,
        "rule": rule,
    }


def _describe_batch(batch: EvaluationBatch, normalization: Normalization) -> Row:
    S_N = ragged.sequence_sum(batch.entropies_K, batch.offsets_N1)
    T_N = ragged.lengths(batch.offsets_N1).double()
    H = uncertainty.entropy(S_N, T_N, normalization)
    score_N = ragged.sequence_sum(batch.dlogprobs_K, batch.offsets_N1)
    score = Estimate(float(score_N.mean()), score_N - score_N.mean())
    score_se = batch.standard_error(score)
    return {
        "H": H.value,
        "H_se": batch.standard_error(H),
        "mean_length": float(T_N.mean()),
        "mean_score_z": score.value / score_se if score_se else 0.0,
    }


def _describe_influence(estimate: Estimate) -> Row:
    squares_N = estimate.influence_N**2
    total = float(squares_N.sum())
    return {
        "excess_kurtosis": uncertainty.excess_kurtosis(estimate.influence_N),
        "largest_influence": float(squares_N.max()) / total if total else 0.0,
    }


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
