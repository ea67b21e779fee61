"""∂_vH from per-token columns: what one step does to the entropy, to first order.

    ∂_vH_seq = E[ Σ_k ḣ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} h_j
    ∂_vL     = E[ Σ_k (T − k − c_k) ℓ̇_k ]
    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L

R_k starts after k because h_k does not depend on a_k. The baselines b_k, c_k may depend on the prefix and on other
sequences only, so they leave the mean unchanged (the score ℓ̇_k has mean zero given its prefix).

Functions that take totals work on a block of sequences, and know of the others by sums at each position: see
`baselines`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import Baseline, BaselineTotals, ReturnsToGo, baselines, returns_to_go


class FirstOrderColumns(NamedTuple):
    """Per-sequence terms, float64 [N]: x and y estimate ∂_vH_seq and ∂_vL; S and T the entropy and length."""

    x_N: Tensor
    y_N: Tensor
    x_local_N: Tensor  # Σ_k ḣ_k, the part of x without the score function
    S_N: Tensor
    T_N: Tensor


def score_coefficients(
    entropies_K: Tensor,
    offsets_N1: Tensor,
    baseline: Baseline,
    dlogprobs_K: Tensor | None = None,
    totals: BaselineTotals | None = None,
) -> ReturnsToGo:
    """R_k − b_k and T − k − c_k: what multiplies the score ℓ̇_k.

    Args:
        entropies_K: h, nats, [K].
        offsets_N1: int64 [N + 1].
        baseline: see `baselines`.
        dlogprobs_K: see `baselines`.
        totals: see `baselines`.

    Returns:
        Two float64 tensors [K].
    """
    returns = returns_to_go(entropies_K, offsets_N1)
    base = baselines(returns, offsets_N1, baseline, dlogprobs_K, totals)
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


class WeightedTotals(NamedTuple):
    """Sums at each position over all sequences, float64 [T]: of 1, of h and of ℓ̇; and how many sequences, [1]."""

    count_T: Tensor
    entropy_T: Tensor
    score_T: Tensor
    sequences_1: Tensor

    def plus(self, other: "WeightedTotals") -> "WeightedTotals":
        """Of the sequences of both."""
        return WeightedTotals(*map(ragged.padded_sum, self, other))


def weighted_totals(entropies_K: Tensor, dlogprobs_K: Tensor, offsets_N1: Tensor) -> WeightedTotals:
    """What `weighted_columns` needs to know of a block of sequences; arguments as there."""
    return WeightedTotals(
        ragged.position_sum(torch.ones_like(entropies_K), offsets_N1),
        ragged.position_sum(entropies_K, offsets_N1),
        ragged.position_sum(dlogprobs_K, offsets_N1),
        torch.tensor([len(offsets_N1) - 1.0], dtype=torch.float64),
    )


def weighted_columns(
    entropies_K: Tensor,
    dlogprobs_K: Tensor,
    dentropies_K: Tensor,
    offsets_N1: Tensor,
    totals: WeightedTotals | None = None,
) -> FirstOrderColumns:
    """The derivative at η = 0 of the estimator with weights normalised at each position, as per-sequence terms.

    The derivative of Σ_k A_k/W_k is Σ_k (Ȧ_k − A_k Ẇ_k): the baseline of step j is Σ_{k>j} A_k, the mean entropy to
    come over all sequences, the finished ones included.

    Args:
        entropies_K: h, nats, [K].
        dlogprobs_K: ℓ̇, nats per unit step, [K].
        dentropies_K: ḣ, nats per unit step, [K].
        offsets_N1: int64 [N + 1].
        totals: of `weighted_totals`, over all sequences; None where these are all.

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence.
    """
    totals = totals or weighted_totals(entropies_K, dlogprobs_K, offsets_N1)
    position_K, score_K = ragged.position_index(offsets_N1), dlogprobs_K.double()
    returns = returns_to_go(entropies_K, offsets_N1)
    # Ẇ_k: mean score of the first k tokens, of all sequences
    score_T = totals.score_T / totals.sequences_1
    dW_T = score_T.cumsum(0) - score_T

    def column(values_K: Tensor, to_come_K: Tensor, total_T: Tensor) -> Tensor:
        A_T = total_T / totals.sequences_1
        A_after_T = A_T.sum() - A_T.cumsum(0)
        terms_N = ragged.sequence_sum((to_come_K - A_after_T[position_K]) * score_K, offsets_N1)
        through_A_N = ragged.sequence_sum(dW_T[position_K] * values_K, offsets_N1)
        return terms_N - (through_A_N - (dW_T * A_T).sum())

    local_N = ragged.sequence_sum(dentropies_K, offsets_N1)
    return FirstOrderColumns(
        x_N=local_N + column(entropies_K.double(), returns.entropy_K, totals.entropy_T),
        y_N=column(torch.ones_like(score_K), returns.length_K, totals.count_T),
        x_local_N=local_N,
        S_N=ragged.sequence_sum(entropies_K, offsets_N1),
        T_N=ragged.lengths(offsets_N1).double(),
    )
