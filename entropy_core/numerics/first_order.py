"""∂_vE[F] from per-token columns: what one step does to a functional, to first order.

    ∂_vE[F] = E[ Σ_k ḟ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} f_j     (Σ_{j≥k} where f_k depends on a_k)

For the entropy of a response, f_k = h_k, and for its length, f_k = 1 and ḟ_k = 0, R_k starts after k, because neither
depends on the token a_k. The baseline b_k may depend on the prefix and on other sequences only, so it leaves the mean
unchanged (the score ℓ̇_k has mean zero given its prefix). Per token,

    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L           (see `uncertainty`)

Functions that take totals work on a block of sequences, and know of the others by sums at each position: see
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
    """R_k − b_k: what multiplies the score ℓ̇_k.

    Args:
        functional: see `functional`.
        tokens: some sequences.
        baseline: see `baselines`.
        totals: see `baselines`.

    Returns:
        float64 [K].
    """
    return returns_to_go(functional, tokens) - baselines(functional, tokens, baseline, totals)


def first_order_columns(functional: Functional, tokens: Tokens, base_K: Tensor) -> Columns:
    """The per-sequence terms whose means give E[F] and ∂_vE[F].

    Args:
        functional: see `functional`.
        tokens: some sequences, with derivatives.
        base_K: b_k, of `baselines.baselines` or `ridge.ridge_baseline`.

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
    """Sums at each position over all sequences, float64 [T]: of f and of ℓ̇; and how many sequences, [1]."""

    values_T: Tensor
    score_T: Tensor
    sequences_1: Tensor

    def plus(self, other: "WeightedTotals") -> "WeightedTotals":
        """Of the sequences of both."""
        return WeightedTotals(*map(ragged.padded_sum, self, other))


def weighted_totals(functional: Functional, tokens: Tokens) -> WeightedTotals:
    """What `weighted_columns` needs to know of a block of sequences; arguments as there."""
    return WeightedTotals(
        ragged.position_sum(functional.values(tokens), tokens.offsets_N1),
        ragged.position_sum(tokens.derivative.logprob_K, tokens.offsets_N1),
        torch.tensor([len(tokens.offsets_N1) - 1.0], dtype=torch.float64),
    )


def weighted_columns(functional: Functional, tokens: Tokens, totals: WeightedTotals | None = None) -> Columns:
    """The derivative at η = 0 of the estimator with weights normalised at each position, as per-sequence terms.

    The derivative of Σ_k A_k/W_k is Σ_k (Ȧ_k − A_k Ẇ_k): the baseline of step j is Σ_{k>j} A_k, the mean value to come
    over all sequences, the finished ones included. (Σ_{k≥j} where f_k depends on a_k: the weight of f_k then has the
    ratio of a_k in it.)

    Args:
        functional: see `functional`.
        tokens: some sequences, with derivatives.
        totals: of `weighted_totals`, over all sequences; None where these are all.

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence.
    """
    totals = totals or weighted_totals(functional, tokens)
    offsets_N1, values_K = tokens.offsets_N1, functional.values(tokens)
    position_K, score_K = ragged.position_index(offsets_N1), tokens.derivative.logprob_K
    score_T, A_T = totals.score_T / totals.sequences_1, totals.values_T / totals.sequences_1
    # Ẇ_k: mean score of the tokens whose ratios are in the weight of f_k, of all sequences
    dW_T, A_after_T = score_T.cumsum(0) - score_T, A_T.sum() - A_T.cumsum(0)
    if functional.of_action:
        dW_T, A_after_T = dW_T + score_T, A_after_T + A_T
    local_N = ragged.sequence_sum(functional.derivative(tokens), offsets_N1)
    future_K = (returns_to_go(functional, tokens) - A_after_T[position_K]) * score_K
    through_A_N = ragged.sequence_sum(dW_T[position_K] * values_K, offsets_N1)
    terms_N = ragged.sequence_sum(future_K, offsets_N1) - (through_A_N - (dW_T * A_T).sum())
    return Columns(total_N=ragged.sequence_sum(values_K, offsets_N1), derivative_N=local_N + terms_N, local_N=local_N)
