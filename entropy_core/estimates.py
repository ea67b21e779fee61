"""Rows of the result table, from the columns of one evaluation batch: prediction, measurement, verdict."""

from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from entropy_core import pareto
from entropy_core.numerics import bootstrap, first_order, importance, path_integral, ragged, ridge, uncertainty
from entropy_core.numerics.bootstrap import BootstrapIntervals
from entropy_core.numerics.first_order import Baseline, FirstOrderColumns, ReturnsToGo
from entropy_core.numerics.token_statistics import TokenDerivatives
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

    def with_baseline(self, baseline: Baseline) -> "EvaluationBatch":
        """The same batch with another baseline of the reward-to-go."""
        returns = first_order.returns_to_go(self.entropies_K, self.offsets_N1)
        if baseline == "ridge":
            units_N = torch.arange(len(self.offsets_N1) - 1) if self.clusters_N is None else self.clusters_N
            features_KF = ridge.prefix_features(self.logprobs_K, self.entropies_K, self.offsets_N1)
            weights_K, folds_N = self.dlogprobs_K.double() ** 2, ridge.folds_of(units_N)
            base = ReturnsToGo(
                *(ridge.ridge_baseline(x_K, features_KF, weights_K, self.offsets_N1, folds_N) for x_K in returns)
            )
        else:
            base = first_order.baselines(returns, self.offsets_N1, baseline, self.dlogprobs_K)
        return self._replace(base=base)

    @property
    def columns(self) -> FirstOrderColumns:
        """Per-sequence terms of ∂_vH."""
        return first_order.columns_given(
            self.base, self.entropies_K, self.dlogprobs_K, self.dentropies_K, self.offsets_N1
        )


class Contributions(NamedTuple):
    """Influence of each U sequence on ∂_vH, float64 [P, G]: along the ∇H of all of E, and of each half, [2, P, G]."""

    whole_PG: Tensor
    halves_2PG: Tensor


class Derivative(NamedTuple):
    """∂_vH for one normalisation, everything per unit step."""

    estimate: Estimate
    of_estimator: dict[importance.Estimator, Estimate]  # the exact derivative of each ΔH estimator at η = 0
    local: float
    jackknife: float
    bootstrap: BootstrapIntervals
    se_given_u: float
    se_over_u: float
    interaction: float
    units_e: int
    prompts_u: int


def derivative_of(
    batch: EvaluationBatch,
    normalization: Normalization,
    contributions: Contributions,
    confidence_level: float,
    resamples: int,
) -> Derivative:
    """∂_vH with its standard errors over E and over U.

    Args:
        batch: E.
        normalization: per sequence or per token.
        contributions: of U.
        confidence_level: of the bootstrap intervals.
        resamples: of the bootstrap.

    Returns:
        Everything per unit step.
    """
    columns = batch.columns
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
            "path_integral": estimate,
        },
        local=float(columns.x_local_N.mean()) / mean_length,
        jackknife=uncertainty.jackknife_standard_error(columns, normalization, batch.clusters_N),
        bootstrap=bootstrap.intervals(columns, normalization, confidence_level, resamples, batch.clusters_N),
        se_given_u=batch.standard_error(estimate),
        se_over_u=uncertainty.clustered_sum_standard_error(contributions.whole_PG),
        interaction=uncertainty.interaction_variance(contributions.whole_PG.sum(1), contributions.halves_2PG.sum(2)),
        units_e=batch.units,
        prompts_u=len(contributions.whole_PG),
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
        derivative.se_given_u, derivative.units_e, derivative.se_over_u, derivative.prompts_u, derivative.interaction
    )
    delta_h1 = derivative.estimate.value * eta
    tail = 0.5 + confidence_level / 2
    half_total = float(student.ppf(tail, total.degrees_of_freedom)) * total.standard_error * abs(eta)
    half_given_u = float(student.ppf(tail, derivative.units_e - 1)) * derivative.se_given_u * abs(eta)
    ends = derivative.bootstrap
    percentile, bca = (sorted(eta * end for end in pair) for pair in (ends[:2], ends[2:4]))
    return {
        "delta_h1": delta_h1,
        "delta_h1_local": derivative.local * eta,
        "se_given_u": derivative.se_given_u * abs(eta),
        "se_given_u_jackknife": derivative.jackknife * abs(eta),
        "se_over_u": derivative.se_over_u * abs(eta),
        "se_interaction": derivative.interaction**0.5 * abs(eta),
        "se_total": total.standard_error * abs(eta),
        "ci_low": delta_h1 - half_total,
        "ci_high": delta_h1 + half_total,
        "ci_given_u_low": delta_h1 - half_given_u,
        "ci_given_u_high": delta_h1 + half_given_u,
        "percentile_low": percentile[0],
        "percentile_high": percentile[1],
        "bca_low": bca[0],
        "bca_high": bca[1],
        "confidence_level": confidence_level,
    }


class Moved(NamedTuple):
    """What is known of E at θ + ηv: ℓ' and h', or the derivatives at the nodes of the path, or both."""

    eta: float
    logprobs_K: Tensor | None = None
    entropies_K: Tensor | None = None
    at_nodes: tuple[TokenDerivatives, ...] = ()


def change_of(
    batch: EvaluationBatch, moved: Moved, estimator: importance.Estimator, normalization: Normalization
) -> tuple[Estimate, importance.PrefixWeights]:
    """ΔH between θ and θ + ηv, paired on the batch, and the weights.

    Args:
        batch: E at θ.
        moved: E at θ + ηv; at η = 0 the change is exactly 0.
        estimator: of ΔH. For `path_integral` the weights are those at its last node.
        normalization: per sequence or per token.

    Returns:
        The estimate in nats, and the weights.
    """
    offsets_N1 = batch.offsets_N1
    S_N, T_N = ragged.sequence_sum(batch.entropies_K, offsets_N1), ragged.lengths(offsets_N1).double()
    if moved.eta == 0:
        weights = importance.prefix_weights(batch.logprobs_K, batch.logprobs_K, offsets_N1)
        return Estimate(0.0, torch.zeros_like(S_N)), weights
    if estimator == "path_integral":
        at_nodes = [importance.prefix_weights(batch.logprobs_K, node.logprobs_K, offsets_N1) for node in moved.at_nodes]
        columns = [
            path_integral.derivative_columns(weights, node, batch.base, offsets_N1)
            for weights, node in zip(at_nodes, moved.at_nodes, strict=True)
        ]
        return path_integral.entropy_change(columns, moved.eta, normalization), at_nodes[-1]
    assert moved.logprobs_K is not None and moved.entropies_K is not None
    weights = importance.prefix_weights(batch.logprobs_K, moved.logprobs_K, offsets_N1)
    if estimator == "per_decision":
        there = uncertainty.moved_entropy(
            importance.per_decision_columns(weights, moved.entropies_K, batch.base, offsets_N1), normalization
        )
    elif estimator == "weighted_per_decision":
        there = uncertainty.moved_entropy(
            importance.weighted_per_decision_columns(weights, moved.entropies_K, offsets_N1), normalization
        )
    else:
        moved_S_N = ragged.sequence_sum(moved.entropies_K, offsets_N1)
        there = uncertainty.snis_entropy(weights.sequence_N, moved_S_N, T_N, normalization)
    return there.minus(uncertainty.entropy(S_N, T_N, normalization)), weights


def measure(
    batch: EvaluationBatch,
    change: Estimate,
    weights: importance.PrefixWeights,
    derivative: Derivative,
    eta: float,
    estimator: importance.Estimator,
    noise_floor: float,
    quantile: float,
) -> Row:
    """ΔH, its difference from δH₁, and what the row is worth.

    Args:
        batch: E.
        change: ΔH, of `change_of`.
        weights: that it came with.
        derivative: of `derivative_of`.
        eta: absolute step size.
        estimator: of ΔH.
        noise_floor: of ΔH, nats.
        quantile: normal quantile of the confidence level.

    Returns:
        Columns of `tables.ESTIMATES`; the measured ones are None where weights overflowed.
    """
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
        "ess_prefix": float(importance.prefix_effective_sample_sizes(weights, batch.offsets_N1).min())
        if usable
        else 0.0,
        "pareto_k": k,
        "pareto_k_threshold": k_threshold,
        "verdict": word,
        "rule": rule,
    }
