"""What is still to come after each step, and what of it was to be expected: the baselines b_k and c_k.

A baseline may depend on the prefix and on other sequences, never on what its own sequence does from that step on.

What a sequence needs to know of the others are sums at each position. They can be taken block by block of sequences and
added (`plus`), and the functions here then work on a block; without such totals the block is all there is.
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


class BaselineTotals(NamedTuple):
    """What the baselines of the entropy and of the length to come need to know of all sequences."""

    entropy: TimeTotals
    length: TimeTotals

    def plus(self, other: "BaselineTotals") -> "BaselineTotals":
        """Of the sequences of both."""
        return BaselineTotals(self.entropy.plus(other.entropy), self.length.plus(other.length))


def baseline_totals(
    returns: ReturnsToGo, offsets_N1: Tensor, baseline: Baseline, dlogprobs_K: Tensor | None = None
) -> BaselineTotals:
    """What `baselines` needs to know of a block of sequences; arguments as there."""
    weights_K = _weights(baseline, dlogprobs_K)
    return BaselineTotals(*(time_totals(values_K, offsets_N1, weights_K) for values_K in returns))


def baselines(
    returns: ReturnsToGo,
    offsets_N1: Tensor,
    baseline: Baseline,
    dlogprobs_K: Tensor | None = None,
    totals: BaselineTotals | None = None,
) -> ReturnsToGo:
    """b_k (of the entropy to come) and c_k (of the length to come).

    Args:
        returns: of every token.
        offsets_N1: int64 [N + 1].
        baseline: `none`; `time_loo`, the mean over the other sequences alive at the same step; `time_loo_weighted`, the
            mean weighted by their ℓ̇², which has the least variance among means for this direction. (`ridge` looks at
            the prefixes, and has a module of its own.)
        dlogprobs_K: ℓ̇, [K]; for `time_loo_weighted` only.
        totals: of `baseline_totals`, over all sequences; None where these are all.

    Returns:
        Two float64 tensors [K].

    Raises:
        ValueError: the weighted baseline without ℓ̇, or `ridge`.
    """
    if baseline == "ridge":
        raise ValueError("the ridge baseline needs the prefixes: see ridge.baselines")
    if baseline == "none":
        return ReturnsToGo(torch.zeros_like(returns.entropy_K), torch.zeros_like(returns.length_K))
    weights_K = _weights(baseline, dlogprobs_K)
    of_entropy, of_length = totals or (None, None)
    return ReturnsToGo(
        time_loo_baseline(returns.entropy_K, offsets_N1, weights_K, of_entropy),
        time_loo_baseline(returns.length_K, offsets_N1, weights_K, of_length),
    )


def _weights(baseline: Baseline, dlogprobs_K: Tensor | None) -> Tensor | None:
    if baseline != "time_loo_weighted":
        return None
    if dlogprobs_K is None:
        raise ValueError("time_loo_weighted needs the derivatives of the log-probabilities")
    return dlogprobs_K.double() ** 2
