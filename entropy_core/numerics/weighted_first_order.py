"""The derivative at η = 0 of `importance`'s `weighted_per_decision` estimator, from per-token columns.

Functions that take totals process one block of sequences; the other sequences enter as sums at each position.
"""

from typing import NamedTuple

from torch import Tensor

from entropy_core.numerics import importance, ragged
from entropy_core.numerics.functional import Columns, Functional, Tokens
from entropy_core.numerics.importance import WeightTotals
from entropy_core.numerics.weights import PrefixWeights, sampling_weights


class WeightedTotals(NamedTuple):
    """`importance.WeightTotals` of a policy and their derivatives along v."""

    value: WeightTotals
    slope: WeightTotals

    def plus(self, other: "WeightedTotals") -> "WeightedTotals":
        """Return the totals over the sequences of both blocks."""
        return WeightedTotals(self.value.plus(other.value), self.slope.plus(other.slope))


def weighted_totals(functional: Functional, tokens: Tokens) -> WeightedTotals:
    """Return the totals of a block of sequences that `weighted_columns` needs; takes the same arguments."""
    weights = sampling_weights(tokens)
    slopes, dvalues_K = _slopes(functional, tokens, weights)
    return WeightedTotals(
        importance.weight_totals(functional, tokens, weights),
        WeightTotals.of(slopes.of(functional), dvalues_K, slopes.sequence_N, tokens.offsets_N1),
    )


def weighted_columns(functional: Functional, tokens: Tokens, totals: WeightedTotals | None = None) -> Columns:
    """Compute per-sequence terms of the derivative of `importance`'s `weighted_per_decision` estimator at η = 0.

    The derivative of Σ_k A_k/W_k is Σ_k (Ȧ_k/W_k − A_k Ẇ_k/W_k²), where A_k is the mean of r_k f_k and W_k that of r_k
    over all sequences; a finished sequence keeps its last weight.

    Args:
        functional: F.
        tokens: a block of sequences, with derivatives.
        totals: `weighted_totals` over all sequences; None if this block is the whole batch.

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence.
    """
    totals = totals or weighted_totals(functional, tokens)
    offsets_N1, weights = tokens.offsets_N1, sampling_weights(tokens)
    slopes, dvalues_K = _slopes(functional, tokens, weights)
    weight_K, dweight_K = weights.of(functional), slopes.of(functional)
    (W_T, A_T), (dW_T, dA_T) = ((of.weight_T, of.value_T) for of in totals)
    # what a sequence adds to A_k, W_k, Ȧ_k and Ẇ_k, each times the derivative of the estimate with respect to it
    of_A_T, of_dA_T, of_dW_T = -dW_T / W_T**2, 1 / W_T, -A_T / W_T**2
    of_W_T = -dA_T / W_T**2 + 2 * A_T * dW_T / W_T**3
    position_K = ragged.position_index(offsets_N1)
    along_K = (of_T.index_select(0, position_K) for of_T in (of_A_T, of_dA_T, of_W_T, of_dW_T))
    of_A_K, of_dA_K, of_W_K, of_dW_K = along_K
    own_K = of_A_K * weight_K * functional.values(tokens) + of_dA_K * dvalues_K
    own_K = own_K + of_W_K * weight_K + of_dW_K * dweight_K
    finished_N = weights.sequence_N * importance.sum_after_end(of_W_T, offsets_N1)
    finished_N = finished_N + slopes.sequence_N * importance.sum_after_end(of_dW_T, offsets_N1)
    value = (dA_T / W_T - A_T * dW_T / W_T**2).sum()
    return Columns(
        total_N=importance.weighted_per_decision_column(functional, tokens, weights, totals.value),
        derivative_N=value + ragged.sequence_sum(own_K, offsets_N1) + finished_N,
        local_N=ragged.sequence_sum(weight_K * functional.derivative(tokens), offsets_N1),
    )


def _slopes(functional: Functional, tokens: Tokens, weights: PrefixWeights) -> tuple[PrefixWeights, Tensor]:
    """Return the derivatives along v of the weights, and of r_k f_k, [K]."""
    score_K = tokens.derivative.logprob_K
    before_K = ragged.sum_before(score_K, tokens.offsets_N1)
    slopes = PrefixWeights(
        weights.before_K * before_K,
        weights.after_K * (before_K + score_K),
        weights.sequence_N * ragged.sequence_sum(score_K, tokens.offsets_N1),
    )
    of_values_K = weights.of(functional) * functional.derivative(tokens)
    return slopes, of_values_K + slopes.of(functional) * functional.values(tokens)
