"""∂_vH from per-token columns: what one step does to the entropy, to first order.

    ∂_vH_seq = E[ Σ_k ḣ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} h_j
    ∂_vL     = E[ Σ_k (T − k − c_k) ℓ̇_k ]
    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L

R_k starts after k because h_k does not depend on a_k. The baselines b_k, c_k may depend on the prefix and on other
sequences only, so they leave the mean unchanged (the score ℓ̇_k has mean zero given its prefix).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged

Baseline = Literal["none", "time_loo", "time_loo_weighted", "ridge"]


class ReturnsToGo(NamedTuple):
    """What is still to come after each step: entropy R_k (nats) and number of tokens T − k, float64 [K]."""

    entropy_K: Tensor
    length_K: Tensor


class FirstOrderColumns(NamedTuple):
    """Per-sequence terms, float64 [N]: x and y estimate ∂_vH_seq and ∂_vL; S and T the entropy and length."""

    x_N: Tensor
    y_N: Tensor
    x_local_N: Tensor  # Σ_k ḣ_k, the part of x without the score function
    S_N: Tensor
    T_N: Tensor


def returns_to_go(entropies_K: Tensor, offsets_N1: Tensor) -> ReturnsToGo:
    """R_k and T − k of every token.

    Args:
        entropies_K: h, nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Two float64 tensors [K].
    """
    remaining_K = ragged.sum_after(torch.ones_like(entropies_K, dtype=torch.float64), offsets_N1)
    return ReturnsToGo(ragged.sum_after(entropies_K, offsets_N1), remaining_K)


def time_loo_baseline(values_K: Tensor, offsets_N1: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """At each step, the mean of `values` over the *other* sequences that are alive at that step.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].
        weights_K: [K], not negative; None for a plain mean, which is also taken where the others' weights are all 0.

    Returns:
        float64 [K]; 0 where no other sequence is alive.
    """
    position_K = ragged.position_index(offsets_N1)
    longest = int(position_K.max()) + 1

    def others(x_K: Tensor) -> Tensor:
        total_T = torch.zeros(longest, dtype=torch.float64).index_add_(0, position_K, x_K)
        return total_T[position_K] - x_K

    values_K = values_K.double()
    count_K = others(torch.ones_like(values_K))
    mean_K = torch.where(count_K > 0, others(values_K) / count_K.clamp_min(1), 0.0)
    if weights_K is None:
        return mean_K
    weight_K = others(weights_K.double())
    # what remains of a sum after its largest term was taken away is rounding, not weight
    some_K = weight_K > 1e-9 * (weight_K + weights_K.double())
    return torch.where(some_K, others(weights_K.double() * values_K) / weight_K.where(some_K, 1.0), mean_K)


def baselines(
    returns: ReturnsToGo, offsets_N1: Tensor, baseline: Baseline, dlogprobs_K: Tensor | None = None
) -> ReturnsToGo:
    """b_k (of the entropy to come) and c_k (of the length to come).

    Args:
        returns: of every token.
        offsets_N1: int64 [N + 1].
        baseline: `none`; `time_loo`, the mean over the other sequences alive at the same step; `time_loo_weighted`, the
            mean weighted by their ℓ̇², which has the least variance among means for this direction. (`ridge` looks at
            the prefixes, and has a module of its own.)
        dlogprobs_K: ℓ̇, [K]; for `time_loo_weighted` only.

    Returns:
        Two float64 tensors [K].

    Raises:
        ValueError: the weighted baseline without ℓ̇, or `ridge`.
    """
    if baseline == "ridge":
        raise ValueError("the ridge baseline needs the prefixes: see ridge.baselines")
    if baseline == "none":
        return ReturnsToGo(torch.zeros_like(returns.entropy_K), torch.zeros_like(returns.length_K))
    if baseline == "time_loo":
        return ReturnsToGo(*(time_loo_baseline(values_K, offsets_N1) for values_K in returns))
    if dlogprobs_K is None:
        raise ValueError("time_loo_weighted needs the derivatives of the log-probabilities")
    weights_K = dlogprobs_K.double() ** 2
    return ReturnsToGo(*(time_loo_baseline(values_K, offsets_N1, weights_K) for values_K in returns))


def score_coefficients(
    entropies_K: Tensor, offsets_N1: Tensor, baseline: Baseline, dlogprobs_K: Tensor | None = None
) -> ReturnsToGo:
    """R_k − b_k and T − k − c_k: what multiplies the score ℓ̇_k.

    Args:
        entropies_K: h, nats, [K].
        offsets_N1: int64 [N + 1].
        baseline: see `baselines`.
        dlogprobs_K: see `baselines`.

    Returns:
        Two float64 tensors [K].
    """
    returns = returns_to_go(entropies_K, offsets_N1)
    base = baselines(returns, offsets_N1, baseline, dlogprobs_K)
    return ReturnsToGo(returns.entropy_K - base.entropy_K, returns.length_K - base.length_K)


def first_order_columns(
    entropies_K: Tensor, dlogprobs_K: Tensor, dentropies_K: Tensor, offsets_N1: Tensor, baseline: Baseline
) -> FirstOrderColumns:
    """The per-sequence terms whose means give ∂_vH_seq, ∂_vL, H_seq and L.

    Args:
        entropies_K: h, nats, [K].
        dlogprobs_K: ℓ̇, nats per unit step, [K].
        dentropies_K: ḣ, nats per unit step, [K].
        offsets_N1: int64 [N + 1].
        baseline: see `baselines`.

    Returns:
        Columns, float64 [N].
    """
    base = baselines(returns_to_go(entropies_K, offsets_N1), offsets_N1, baseline, dlogprobs_K)
    return columns_given(base, entropies_K, dlogprobs_K, dentropies_K, offsets_N1)


def columns_given(
    base: ReturnsToGo, entropies_K: Tensor, dlogprobs_K: Tensor, dentropies_K: Tensor, offsets_N1: Tensor
) -> FirstOrderColumns:
    """`first_order_columns` with baselines that are already there.

    Args:
        base: b_k and c_k, each [K].
        entropies_K: h, nats, [K].
        dlogprobs_K: ℓ̇, nats per unit step, [K].
        dentropies_K: ḣ, nats per unit step, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Columns, float64 [N].
    """
    returns = returns_to_go(entropies_K, offsets_N1)
    local_N, score_K = ragged.sequence_sum(dentropies_K, offsets_N1), dlogprobs_K.double()
    return FirstOrderColumns(
        x_N=local_N + ragged.sequence_sum((returns.entropy_K - base.entropy_K) * score_K, offsets_N1),
        y_N=ragged.sequence_sum((returns.length_K - base.length_K) * score_K, offsets_N1),
        x_local_N=local_N,
        S_N=ragged.sequence_sum(entropies_K, offsets_N1),
        T_N=ragged.lengths(offsets_N1).double(),
    )


def weighted_columns(
    entropies_K: Tensor, dlogprobs_K: Tensor, dentropies_K: Tensor, offsets_N1: Tensor
) -> FirstOrderColumns:
    """The derivative at η = 0 of the estimator with weights normalised at each position, as per-sequence terms.

    The derivative of Σ_k A_k/W_k is Σ_k (Ȧ_k − A_k Ẇ_k): the baseline of step j is Σ_{k>j} A_k, the mean entropy to
    come over all sequences, the finished ones included.

    Args:
        entropies_K: h, nats, [K].
        dlogprobs_K: ℓ̇, nats per unit step, [K].
        dentropies_K: ḣ, nats per unit step, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence.
    """
    position_K, N = ragged.position_index(offsets_N1), len(offsets_N1) - 1
    score_K = dlogprobs_K.double()
    returns = returns_to_go(entropies_K, offsets_N1)
    longest = int(position_K.max()) + 1
    # Ẇ_k: mean score of the first k tokens, of all sequences
    score_T = torch.zeros(longest, dtype=torch.float64).index_add_(0, position_K, score_K) / N
    dW_T = score_T.cumsum(0) - score_T

    def column(values_K: Tensor, to_come_K: Tensor) -> Tensor:
        A_T = torch.zeros(longest, dtype=torch.float64).index_add_(0, position_K, values_K) / N
        A_after_T = A_T.sum() - A_T.cumsum(0)
        terms_N = ragged.sequence_sum((to_come_K - A_after_T[position_K]) * score_K, offsets_N1)
        through_A_N = ragged.sequence_sum(dW_T[position_K] * values_K, offsets_N1)
        return terms_N - (through_A_N - through_A_N.mean())

    local_N = ragged.sequence_sum(dentropies_K, offsets_N1)
    return FirstOrderColumns(
        x_N=local_N + column(entropies_K.double(), returns.entropy_K),
        y_N=column(torch.ones_like(score_K), returns.length_K),
        x_local_N=local_N,
        S_N=ragged.sequence_sum(entropies_K, offsets_N1),
        T_N=ragged.lengths(offsets_N1).double(),
    )
