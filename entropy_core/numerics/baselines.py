"""Returns-to-go R_k of a functional, and the baselines b_k that are subtracted from them.

A baseline may depend on the prefix and on other sequences, but never on its own sequence from step k on.

The other sequences enter as sums at each position, called totals. Totals of blocks of sequences can be added (`plus`),
and then the functions here process one block at a time. Without totals, the given block is the whole batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.functional import Functional, Tokens
from entropy_core.numerics.weights import sampling_weights


def returns_to_go(functional: Functional, tokens: Tokens) -> Tensor:
    """Return R_k, the sum of the per-token values f_j that depend on the token of step k.

    Args:
        functional: R_k = Σ_{j>k} f_j, or Σ_{j≥k} f_j if f_k depends on the token of step k. If another law than the
            policy drew the tokens, each f_j has the likelihood ratio of the tokens between step k and f_j as a factor.
        tokens: a block of sequences.

    Returns:
        float64 [K].
    """
    weights = sampling_weights(tokens)
    values_K = weights.of(functional) * functional.values(tokens)
    after_K = ragged.sum_after(values_K, tokens.offsets_N1)
    returns_K = after_K + values_K if functional.of_action else after_K
    return returns_K / weights.after_K


class TimeTotals(NamedTuple):
    """Sums at each position over all sequences, float64 [T]: of 1, of values, of weights, of weights × values."""

    count_T: Tensor
    values_T: Tensor
    weights_T: Tensor
    weighted_T: Tensor

    def plus(self, other: "TimeTotals") -> "TimeTotals":
        """Return the totals over the sequences of both blocks."""
        return TimeTotals(*map(ragged.padded_sum, self, other))


def time_totals(values_K: Tensor, offsets_N1: Tensor, weights_K: Tensor | None = None) -> TimeTotals:
    """Sum values and weights of a block of sequences at each position, for `time_loo_baseline`.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].
        weights_K: non-negative weights [K]; None for weights of 1.

    Returns:
        The totals of this block.
    """
    ones_K = torch.ones(len(values_K), dtype=torch.float64)
    weights_K = ones_K if weights_K is None else weights_K.double()
    columns = ones_K, values_K, weights_K, weights_K * values_K.double()
    return TimeTotals(*(ragged.position_sum(column_K, offsets_N1) for column_K in columns))


def time_loo_baseline(
    values_K: Tensor, offsets_N1: Tensor, weights_K: Tensor | None = None, totals: TimeTotals | None = None
) -> Tensor:
    """Return, at each step, the mean of `values_K` over the *other* sequences that reach that step.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].
        weights_K: non-negative weights [K]; None for a plain mean, which is also used if all other weights are 0.
        totals: `time_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [K]; 0 if no other sequence reaches the step.
    """
    position_K = ragged.position_index(offsets_N1)
    totals = totals or time_totals(values_K, offsets_N1, weights_K)

    def others(total_T: Tensor, own_K: Tensor) -> Tensor:
        return total_T.index_select(0, position_K) - own_K

    values_K = values_K.double()
    count_K = others(totals.count_T, torch.ones_like(values_K))
    mean_K = torch.where(count_K > 0, others(totals.values_T, values_K) / count_K.clamp_min(1), 0.0)
    if weights_K is None:
        return mean_K
    weights_K = weights_K.double()
    weight_K = others(totals.weights_T, weights_K)
    # a sum minus its dominant term can leave only rounding error, which must not count as weight
    some_K = weight_K > 1e-9 * (weight_K + weights_K)
    weighted_K = others(totals.weighted_T, weights_K * values_K)
    return torch.where(some_K, weighted_K / weight_K.where(some_K, 1.0), mean_K)


def baseline_totals(functional: Functional, tokens: Tokens, baseline: Baseline) -> TimeTotals:
    """Return the totals of a block of sequences that `baselines` needs; takes the same arguments."""
    return time_totals(returns_to_go(functional, tokens), tokens.offsets_N1, _weights(baseline, tokens))


def baselines(functional: Functional, tokens: Tokens, baseline: Baseline, totals: TimeTotals | None = None) -> Tensor:
    """Compute the baseline b_k of the returns-to-go of a functional.

    Args:
        functional: the functional, which defines R_k.
        tokens: a block of sequences, with derivatives for `time_loo_weighted`.
        baseline: `none`; `time_loo`, the mean of R over the other sequences that reach the same step; or
            `time_loo_weighted`, the mean weighted by ℓ̇², which has the least variance of all means for this direction.
            (`ridge` uses the prefixes; see the module `ridge`.) If another law than the policy drew the tokens, these
            means have the factors W_{k+1} and W²_{k+1} as further weights.
        totals: `baseline_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [K].

    Raises:
        ValueError: the weighted baseline without ℓ̇, or `ridge`.
    """
    if baseline == "ridge":
        raise ValueError("the ridge baseline needs the prefixes: see ridge.baselines")
    returns_K = returns_to_go(functional, tokens)
    if baseline == "none":
        return torch.zeros_like(returns_K)
    return time_loo_baseline(returns_K, tokens.offsets_N1, _weights(baseline, tokens), totals)


def score_weights(tokens: Tokens) -> Tensor:
    """Return (W_{k+1} ℓ̇_k)², the weights of the least-squares baselines, float64 [K]."""
    return (sampling_weights(tokens).after_K * tokens.derivative.logprob_K) ** 2


def _weights(baseline: Baseline, tokens: Tokens) -> Tensor | None:
    if baseline == "time_loo_weighted":
        return score_weights(tokens)
    return None if tokens.proposal_logprobs_K is None else sampling_weights(tokens).after_K
