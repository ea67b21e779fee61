"""What is still to come after each step, and what of it was to be expected: the baseline b_k.

A baseline may depend on the prefix and on other sequences, never on what its own sequence does from that step on.

What a sequence needs to know of the others are sums at each position. They can be taken block by block of sequences and
added (`plus`), and the functions here then work on a block; without such totals the block is all there is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.functional import Functional, Tokens


def returns_to_go(functional: Functional, tokens: Tokens) -> Tensor:
    """R_k: what the functional adds from the token of step k on, as far as it depends on that token.

    Args:
        functional: R_k = Σ_{j>k} f_j, or Σ_{j≥k} f_j where f_k depends on the token of step k.
        tokens: some sequences.

    Returns:
        float64 [K].
    """
    values_K = functional.values(tokens)
    after_K = ragged.sum_after(values_K, tokens.offsets_N1)
    return after_K + values_K if functional.of_action else after_K


class TimeTotals(NamedTuple):
    """Sums at each position over all sequences, float64 [T]: of 1, of values, of weights, of weights × values."""

    count_T: Tensor
    values_T: Tensor
    weights_T: Tensor
    weighted_T: Tensor

    def plus(self, other: "TimeTotals") -> "TimeTotals":
        """Of the sequences of both."""
        return TimeTotals(*map(ragged.padded_sum, self, other))


def time_totals(values_K: Tensor, offsets_N1: Tensor, weights_K: Tensor | None = None) -> TimeTotals:
    """What `time_loo_baseline` needs to know of a block of sequences.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].
        weights_K: [K], not negative; None for 1.

    Returns:
        The sums.
    """
    ones_K = torch.ones(len(values_K), dtype=torch.float64)
    weights_K = ones_K if weights_K is None else weights_K.double()
    columns = ones_K, values_K, weights_K, weights_K * values_K.double()
    return TimeTotals(*(ragged.position_sum(column_K, offsets_N1) for column_K in columns))


def time_loo_baseline(
    values_K: Tensor, offsets_N1: Tensor, weights_K: Tensor | None = None, totals: TimeTotals | None = None
) -> Tensor:
    """At each step, the mean of `values` over the *other* sequences that are alive at that step.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].
        weights_K: [K], not negative; None for a plain mean, which is also taken where the others' weights are all 0.
        totals: of `time_totals`, over all sequences; None where these are all.

    Returns:
        float64 [K]; 0 where no other sequence is alive.
    """
    position_K = ragged.position_index(offsets_N1)
    totals = totals or time_totals(values_K, offsets_N1, weights_K)

    def others(total_T: Tensor, own_K: Tensor) -> Tensor:
        return total_T[position_K] - own_K

    values_K = values_K.double()
    count_K = others(totals.count_T, torch.ones_like(values_K))
    mean_K = torch.where(count_K > 0, others(totals.values_T, values_K) / count_K.clamp_min(1), 0.0)
    if weights_K is None:
        return mean_K
    weights_K = weights_K.double()
    weight_K = others(totals.weights_T, weights_K)
    # what remains of a sum after its largest term was taken away is rounding, not weight
    some_K = weight_K > 1e-9 * (weight_K + weights_K)
    weighted_K = others(totals.weighted_T, weights_K * values_K)
    return torch.where(some_K, weighted_K / weight_K.where(some_K, 1.0), mean_K)


def baseline_totals(functional: Functional, tokens: Tokens, baseline: Baseline) -> TimeTotals:
    """What `baselines` needs to know of a block of sequences; arguments as there."""
    return time_totals(returns_to_go(functional, tokens), tokens.offsets_N1, _weights(baseline, tokens))


def baselines(functional: Functional, tokens: Tokens, baseline: Baseline, totals: TimeTotals | None = None) -> Tensor:
    """b_k of what is to come of a functional.

    Args:
        functional: see `returns_to_go`.
        tokens: some sequences; for `time_loo_weighted` with derivatives.
        baseline: `none`; `time_loo`, the mean over the other sequences alive at the same step; `time_loo_weighted`, the
            mean weighted by their ℓ̇², which has the least variance among means for this direction. (`ridge` looks at
            the prefixes, and has a module of its own.)
        totals: of `baseline_totals`, over all sequences; None where these are all.

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


def _weights(baseline: Baseline, tokens: Tokens) -> Tensor | None:
    return tokens.derivative.logprob_K**2 if baseline == "time_loo_weighted" else None
