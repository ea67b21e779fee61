"""∂_vE[F], the first-order effect of a step v on a functional F = Σ_k f_k, from per-token columns.

    ∂_vE[F] = E[ Σ_k ḟ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} f_j     (Σ_{j≥k} if f_k depends on the token a_k)

The entropy of a response has f_k = h_k, and its length has f_k = 1 and ḟ_k = 0. Neither depends on the token a_k, so
R_k starts after k. The baseline b_k depends only on the prefix and on other sequences, so it does not change the mean:
the score ℓ̇_k has mean zero given its prefix. The derivative of the entropy per token is

    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L           (computed in `uncertainty`)

Functions that take totals process one block of sequences; the other sequences enter as sums at each position, as in
`baselines`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import TimeTotals, baselines, returns_to_go
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.functional import Columns, Functional, Tokens


def score_coefficients(
    functional: Functional, tokens: Tokens, baseline: Baseline, totals: TimeTotals | None = None
) -> Tensor:
    """Return R_k − b_k, the factor of the score ℓ̇_k.

    Args:
        functional: F.
        tokens: a block of sequences.
        baseline: name of the baseline, as in `baselines.baselines`.
        totals: `baselines.baseline_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [K].
    """
    return returns_to_go(functional, tokens) - baselines(functional, tokens, baseline, totals)


def first_order_columns(functional: Functional, tokens: Tokens, base_K: Tensor) -> Columns:
    """Compute the per-sequence terms whose means estimate E[F] and ∂_vE[F].

    Args:
        functional: F.
        tokens: a block of sequences, with derivatives.
        base_K: b_k from `baselines.baselines` or `ridge.ridge_baseline`.

    Returns:
        Columns, float64 [N].
    """
    offsets_N1, score_K = tokens.offsets_N1, tokens.derivative.logprob_K
    local_N = ragged.sequence_sum(functional.derivative(tokens), offsets_N1)
    future_K = (returns_to_go(functional, tokens) - base_K) * score_K
    return Columns(
        total_N=ragged.sequence_sum(functional.values(tokens), offsets_N1),
        derivative_N=local_N + ragged.sequence_sum(future_K, offsets_N1),
        local_N=local_N,
    )


class WeightedTotals(NamedTuple):
    """Sums of f and of ℓ̇ at each position over all sequences, float64 [T], and the number of sequences, [1]."""

    values_T: Tensor
    score_T: Tensor
    sequences_1: Tensor

    def plus(self, other: "WeightedTotals") -> "WeightedTotals":
        """Return the totals over the sequences of both blocks."""
        return WeightedTotals(*map(ragged.padded_sum, self, other))


def weighted_totals(functional: Functional, tokens: Tokens) -> WeightedTotals:
    """Return the totals of a block of sequences that `weighted_columns` needs; takes the same arguments."""
    return WeightedTotals(
        ragged.position_sum(functional.values(tokens), tokens.offsets_N1),
        ragged.position_sum(tokens.derivative.logprob_K, tokens.offsets_N1),
        torch.tensor([len(tokens.offsets_N1) - 1.0], dtype=torch.float64),
    )


def weighted_columns(functional: Functional, tokens: Tokens, totals: WeightedTotals | None = None) -> Columns:
    """Compute per-sequence terms of the derivative of `importance`'s `weighted_per_decision` estimator at η = 0.

    The derivative of Σ_k A_k/W_k is Σ_k (Ȧ_k − A_k Ẇ_k). The baseline of step j is therefore Σ_{k>j} A_k, the mean
    return-to-go over all sequences including finished ones. (It is Σ_{k≥j} if f_k depends on a_k, because the weight
    of f_k then includes the ratio of a_k.)

    Args:
        functional: F.
        tokens: a block of sequences, with derivatives.
        totals: `weighted_totals` over all sequences; None if this block is the whole batch.

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence.
    """
    totals = totals or weighted_totals(functional, tokens)
    offsets_N1, values_K = tokens.offsets_N1, functional.values(tokens)
    position_K, score_K = ragged.position_index(offsets_N1), tokens.derivative.logprob_K
    score_T, A_T = totals.score_T / totals.sequences_1, totals.values_T / totals.sequences_1
    # Ẇ_k: mean over all sequences of the scores of the tokens whose ratios enter the weight of f_k
    dW_T, A_after_T = score_T.cumsum(0) - score_T, A_T.sum() - A_T.cumsum(0)
    if functional.of_action:
        dW_T, A_after_T = dW_T + score_T, A_after_T + A_T
    local_N = ragged.sequence_sum(functional.derivative(tokens), offsets_N1)
    future_K = (returns_to_go(functional, tokens) - A_after_T[position_K]) * score_K
    through_A_N = ragged.sequence_sum(dW_T[position_K] * values_K, offsets_N1)
    terms_N = ragged.sequence_sum(future_K, offsets_N1) - (through_A_N - (dW_T * A_T).sum())
    return Columns(total_N=ragged.sequence_sum(values_K, offsets_N1), derivative_N=local_N + terms_N, local_N=local_N)
