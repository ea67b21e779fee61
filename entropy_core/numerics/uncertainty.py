"""Estimates with their influence functions, and the standard errors that follow from them.

A smooth function of means has an influence value ψ_i per sequence with Σψ_i = 0, and its standard error over N
independent sequences is sd(ψ)/√N. The influence of a difference of estimates on one batch is the difference of their
influences, so comparisons are paired. `given U` means that the update is held fixed and only the batch E varies.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns, Functional, ratio_slope


class Estimate(NamedTuple):
    """A value and the influence of each sequence on it, float64 [N]."""

    value: float
    influence_N: Tensor

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate of `factor` times the quantity."""
        return Estimate(self.value * factor, self.influence_N * factor)

    def plus(self, other: "Estimate") -> "Estimate":
        """Return the estimate of the sum; both must come from the same batch."""
        return Estimate(self.value + other.value, self.influence_N + other.influence_N)

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the estimate of the difference; both must come from the same batch."""
        return Estimate(self.value - other.value, self.influence_N - other.influence_N)


def mean(values_N: Tensor) -> Estimate:
    """Estimate E[x] from one value x_i per sequence, float64 [N]."""
    value = values_N.mean()
    return Estimate(float(value), values_N - value)


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Estimate a/b from two estimates on the same batch.

    Args:
        numerator: a.
        denominator: b.

    Returns:
        a/b, with ψ_i = (ψ_i(a) − (a/b)ψ_i(b))/b.
    """
    value = numerator.value / denominator.value
    return Estimate(value, (numerator.influence_N - value * denominator.influence_N) / denominator.value)


def ratio_derivative(numerator: Columns, denominator: Columns) -> Estimate:
    """Estimate g = ∂_v(E[F]/E[G]), with ψ_i = (x_i − H y_i − g t_i − Y (s_i − H t_i)/L)/L.

    H = E[F]/E[G], L = E[G], and Y is the mean of the y_i.

    Args:
        numerator: columns of F, with totals s_i and derivatives x_i.
        denominator: columns of G, with totals t_i and derivatives y_i.

    Returns:
        The estimate, per unit step.
    """
    x, y = mean(numerator.derivative_N), mean(denominator.derivative_N)
    L = mean(denominator.total_N)
    H = ratio(mean(numerator.total_N), L)
    # product rule on (X − H·Y)/L; `excess` is X − H·Y with its influence
    excess = Estimate(x.value - H.value * y.value, x.influence_N - H.value * y.influence_N - y.value * H.influence_N)
    return ratio(excess, L)


def entropy(S_N: Tensor, T_N: Tensor, normalization: Normalization) -> Estimate:
    """Estimate H_seq = E[S] or H_tok = E[S]/E[T].

    Args:
        S_N: entropy of each sequence, nats, float64 [N].
        T_N: length of each sequence, float64 [N].
        normalization: per sequence or per token.

    Returns:
        The estimate, in nats per sequence or per token.
    """
    return mean(S_N) if normalization == "per_sequence" else ratio(mean(S_N), mean(T_N))


def entropy_derivative(columns: Mapping[Functional, Columns], normalization: Normalization) -> Estimate:
    """Estimate ∂_vH_seq or ∂_vH_tok, the derivative of the entropy along the step v.

    Args:
        columns: `first_order.first_order_columns` of entropy and length.
        normalization: per sequence or per token.

    Returns:
        The estimate, in nats per unit step.
    """
    if normalization == "per_sequence":
        return mean(columns[ENTROPY].derivative_N)
    return ratio_derivative(columns[ENTROPY], columns[LENGTH])


def snis_derivative(
    columns: Mapping[Functional, Columns],
    score_N: Tensor,
    normalization: Normalization,
    weights_N: Tensor | None = None,
) -> Estimate:
    """Compute the derivative of `snis_entropy` at η = 0, the limit of ΔH/η of the `snis` estimator on this batch.

    The weights are w ≈ 1 + ηs with the score s of the whole sequence, so Σ wS'/Σ wT has the derivative
    (E[sS + Ṡ] − H·E[sT])/L; for `per_sequence`, 1 replaces T. Its expectation is ∂_vH, with more noise.

    Args:
        columns: `first_order.first_order_columns` of entropy and length, without weights; only totals and local parts
            are used.
        score_N: s = Σ_k ℓ̇_k, float64 [N].
        normalization: per sequence or per token.
        weights_N: weights W at η = 0, a factor of every term, float64 [N]; None if all are 1.

    Returns:
        The estimate, in nats per unit step.
    """

    def weighted(total_N: Tensor, local_N: Tensor) -> Columns:
        columns = Columns(total_N, score_N * total_N + local_N, local_N)
        return columns if weights_N is None else Columns(*(weights_N * column_N for column_N in columns))

    S_N, T_N = columns[ENTROPY].total_N, columns[LENGTH].total_N
    divided_by_N = T_N if normalization == "per_token" else torch.ones_like(T_N)
    return ratio_derivative(
        weighted(S_N, columns[ENTROPY].local_N), weighted(divided_by_N, torch.zeros_like(divided_by_N))
    )


def snis_entropy(weights_N: Tensor, S_N: Tensor, T_N: Tensor, normalization: Normalization) -> Estimate:
    """Estimate H(θ') with self-normalised weights of whole sequences.

    Args:
        weights_N: importance weights w, float64 [N].
        S_N: entropy of each sequence at θ', nats, float64 [N].
        T_N: length of each sequence, float64 [N].
        normalization: per sequence or per token.

    Returns:
        The estimate, in nats per sequence or per token.
    """
    relative_N = weights_N / weights_N.mean()
    denominator_N = relative_N * T_N if normalization == "per_token" else relative_N
    return ratio(mean(relative_N * S_N), mean(denominator_N))


def standard_error(influence_N: Tensor, clusters_N: Tensor | None = None) -> float:
    """Compute the standard error of an estimate from its influence values.

    Args:
        influence_N: ψ, float64 [N].
        clusters_N: int64 [N], cluster of each sequence; None for independent sequences.

    Returns:
        √(C/(C−1)·Σ_c (Σ_{i∈c} ψ_i)²)/N over C clusters; NaN for fewer than two.
    """
    sums_C = cluster_sums(influence_N, clusters_N)
    count = len(sums_C)
    if count < 2:
        return float("nan")
    return float((count / (count - 1) * (sums_C**2).sum()).sqrt()) / len(influence_N)


def jackknife_standard_error(
    columns: Mapping[Functional, Columns], normalization: Normalization, clusters_N: Tensor | None = None
) -> float:
    """Compute the delete-one-cluster jackknife error of ∂_vH, √((C−1)/C Σ_c (g_(c) − ḡ)²); g_(c) omits cluster c.

    Args:
        columns: `first_order.first_order_columns` of entropy and length; their baselines are not recomputed.
        normalization: per sequence or per token.
        clusters_N: int64 [N], cluster of each sequence; None to delete single sequences.

    Returns:
        Nats per unit step; NaN for fewer than two clusters.
    """
    (S_N, x_N, _), (T_N, y_N, _) = columns[ENTROPY], columns[LENGTH]
    size_C = cluster_sums(torch.ones_like(x_N), clusters_N)
    C, N = len(size_C), len(x_N)
    if C < 2:
        return float("nan")
    x_C, y_C, S_C, T_C = ((c.sum() - cluster_sums(c, clusters_N)) / (N - size_C) for c in (x_N, y_N, S_N, T_N))
    without_C = x_C if normalization == "per_sequence" else ratio_slope(x_C, y_C, S_C / T_C, T_C)
    return float(((C - 1) / C * ((without_C - without_C.mean()) ** 2).sum()).sqrt())


def cluster_sums(values_N: Tensor, clusters_N: Tensor | None) -> Tensor:
    """Sum over the sequences of each cluster.

    Args:
        values_N: float64 [N, …].
        clusters_N: int64 [N], cluster of each sequence; None if every sequence is its own cluster.

    Returns:
        float64 [C, …], in the order of the cluster ids.
    """
    if clusters_N is None:
        return values_N
    _, inverse_N = clusters_N.unique(return_inverse=True)
    return values_N.new_zeros(int(inverse_N.max()) + 1, *values_N.shape[1:]).index_add_(0, inverse_N, values_N)


def clustered_sum_standard_error(contributions_PG: Tensor) -> float:
    """Compute the standard error of Σ_p c_p for independently drawn prompts p: √(P/(P−1)·Σ_p (c_p − c̄)²).

    Args:
        contributions_PG: contribution of each sequence of U, float64 [P, G], one row per prompt; c_p is the row sum.

    Returns:
        Standard error in the unit of the contributions; NaN for fewer than two prompts.
    """
    per_prompt_P = contributions_PG.sum(dim=1)
    P = len(per_prompt_P)
    return float((P * per_prompt_P.var()).sqrt()) if P > 1 else float("nan")


def interaction_variance(whole_P: Tensor, halves_2P: Tensor) -> float:
    """Estimate the E×U interaction, the part of the variance over U that is due to the sampling error of ∇H.

    The contributions of the prompts of U are linear in ∇H. Contributions computed with ∇H from two independent halves
    of E have independent errors, so their covariance over prompts estimates the variance over U for the exact ∇H. The
    interaction is the excess of the plug-in variance P·Var_p(c_p) over it.

    Args:
        whole_P: contribution of each prompt, with ∇H from all of E, float64 [P].
        halves_2P: contribution of each prompt, with ∇H from each half of E, float64 [2, P].

    Returns:
        P·Var_p(whole) − P·Cov_p(half, other half), in [0, P·Var_p(whole)]; NaN for fewer than two prompts.
    """
    P = len(whole_P)
    if P < 2:
        return float("nan")
    plug_in = float(P * whole_P.var())
    return plug_in - min(max(float(P * halves_2P.cov()[0, 1]), 0.0), plug_in)


class Total(NamedTuple):
    """Standard error over both batches, and the degrees of freedom of its t interval."""

    standard_error: float
    degrees_of_freedom: float


def total_standard_error(
    se_given_u: float,
    n_e: int,
    se_over_u: float,
    n_u: int,
    interaction: float = 0.0,
    draws_of_u: int = 1,
) -> Total:
    """Compute √(SE²_E + d·(SE²_U − interaction)), with Welch-Satterthwaite degrees of freedom.

    E and U are independent, so their variances add. Both plug-in variances contain the E×U interaction, so it is
    subtracted once. The effect of the step on the U at hand differs from the mean over U by one draw of U (d = 1), and
    from the effect of the step on the next U by two (d = 2).

    Args:
        se_given_u: standard error over E with U fixed.
        n_e: number of independent units of E.
        se_over_u: standard error over U with E fixed.
        n_u: number of units that `se_over_u` comes from, its degrees of freedom plus 1.
        interaction: `interaction_variance`; 0 counts the interaction twice, which makes the error too large.
        draws_of_u: d.

    Returns:
        The total and its degrees of freedom; NaN if E or U has fewer than two units.
    """
    if n_e < 2 or n_u < 2:
        return Total(float("nan"), float("nan"))
    variance_e, variance_u = se_given_u**2, draws_of_u * max(se_over_u**2 - interaction, 0.0)
    total = variance_e + variance_u
    if total == 0.0:
        return Total(0.0, float(n_e - 1))
    return Total(total**0.5, total**2 / (variance_e**2 / (n_e - 1) + variance_u**2 / (n_u - 1)))


def normal_quantile(confidence_level: float) -> float:
    """Return z with P(|Z| ≤ z) = `confidence_level` for a standard normal Z."""
    return NormalDist().inv_cdf(0.5 + confidence_level / 2)


POWER_QUANTILE = normal_quantile(0.6)
"""A change of (t + 0.84) standard errors, with the t quantile of a test, is detected with probability 80 %."""


def excess_kurtosis(influence_N: Tensor) -> float:
    """Return E[ψ⁴]/E[ψ²]² − 3; 0 if all ψ are 0."""
    second = (influence_N**2).mean()
    return float((influence_N**4).mean() / second**2 - 3) if second > 0 else 0.0
