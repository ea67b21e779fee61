"""Rows of the result table, from the columns of one evaluation batch: prediction, measurement, verdict."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student
from torch import Tensor

from entropy_core import pareto
from entropy_core.numerics import first_order, importance, ragged, uncertainty
from entropy_core.numerics.first_order import Baseline, FirstOrderColumns, ReturnsToGo
from entropy_core.numerics.uncertainty import Estimate, Normalization
from entropy_core.numerics.verdicts import verdict

Row = dict[str, Any]

POWER_QUANTILE = uncertainty.normal_quantile(0.6)  # a change of (z + 0.84) SE is detected with probability 80 %


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


def derivative_of(
    batch: EvaluationBatch, baseline: Baseline, normalization: Normalization, contributions_PG: Tensor
) -> Derivative:
    """∂_vH with its standard errors over E and over U.

    Args:
        batch: E.
        baseline: of the reward-to-go.
        normalization: per sequence or per token.
        contributions_PG: influence of each U sequence on ∂_vH, float64 [P, G].

    Returns:
        Everything per unit step.
    """
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


def predict(derivative: Derivative, eta: float, confidence_level: float) -> Row:
    """δH₁ = η·∂_vH with its standard errors and intervals.

    Args:
        derivative: of `derivative_of`.
        eta: absolute step size.
        confidence_level: of the intervals; t quantiles.

    Returns:
        Columns of `tables.ESTIMATES`, in nats.
    """
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


def numerical_noise(
    batch: EvaluationBatch, rescored: Sequence[Mapping[str, Tensor]], normalization: Normalization
) -> float:
    """Twice the root mean square of the ΔH that rounding alone makes, on the first sequences of the batch.

    Args:
        batch: E.
        rescored: `logprobs` and `entropies` of the same tokens under other rounding errors, one mapping per draw.
        normalization: per sequence or per token.

    Returns:
        Nats.
    """
    first = batch.first_tokens(len(rescored[0]["entropies"]))
    changes = [_change(first, columns, "per_decision", normalization)[0].value for columns in rescored]
    return 2.0 * (sum(change**2 for change in changes) / len(changes)) ** 0.5


def measure(
    batch: EvaluationBatch,
    columns: Mapping[str, Tensor],
    derivative: Derivative,
    eta: float,
    estimator: importance.Estimator,
    normalization: Normalization,
    noise_floor: float,
    quantile: float,
) -> Row:
    """ΔH, its difference from δH₁, and what the row is worth.

    Args:
        batch: E.
        columns: `logprobs` and `entropies` at θ + ηv.
        derivative: of `derivative_of`.
        eta: absolute step size.
        estimator: of ΔH.
        normalization: per sequence or per token.
        noise_floor: of `numerical_noise`.
        quantile: normal quantile of the confidence level.

    Returns:
        Columns of `tables.ESTIMATES`; the measured ones are None where weights overflowed.
    """
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
        "minimum_detectable": (quantile + POWER_QUANTILE) * measured["delta_h_se"] + noise_floor if usable else None,
        "ess": ess,
        "ess_fraction": ess / N,
        "pareto_k": k,
        "pareto_k_threshold": k_threshold,
        "verdict": word,
        "rule": rule,
    }


def describe_batch(batch: EvaluationBatch, normalization: Normalization) -> Row:
    """Entropy and length of E, and the z of its mean score along v, which is zero for correctly scored samples.

    Args:
        batch: E.
        normalization: per sequence or per token.

    Returns:
        Columns of `tables.ESTIMATES`.
    """
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


def describe_influence(estimate: Estimate) -> Row:
    """How heavy the tails of an estimate's influence values are.

    Args:
        estimate: of ∂_vH.

    Returns:
        Columns of `tables.ESTIMATES`.
    """
    squares_N = estimate.influence_N**2
    total = float(squares_N.sum())
    return {
        "excess_kurtosis": uncertainty.excess_kurtosis(estimate.influence_N),
        "largest_influence": float(squares_N.max()) / total if total else 0.0,
    }
