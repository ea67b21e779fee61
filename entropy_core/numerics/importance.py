"""Estimate E[F] at θ' = θ + ηv, for a functional F = Σ_k f_k, from sequences sampled at θ (importance sampling).

Prefix weights are ρ_k = Π_{j<k} π_θ'(a_j|s_j)/π_θ(a_j|s_j) with ρ_1 = 1, and w = ρ_{T+1} is the weight of the whole
sequence. The weight r_k of f_k is ρ_k, or ρ_{k+1} if f_k depends on the token a_k. A prime marks values at θ'.

    per_decision   E[F](θ') = E[ Σ_k r_k f'_k − Σ_k b_k (ρ_{k+1} − ρ_k) ]
    weighted_…     E[F](θ') = Σ_k A_k/W_k, where A_k is the mean of r_k f'_k and W_k the mean of r_k over *all*
                   sequences; a finished sequence keeps its w
    snis           E[F](θ') = Σ_i w_i F'_i / Σ_i w_i
    path_integral  see the module `path_integral`

The entropy per token is the ratio of the entropy of a response to its length, both at θ'. For `snis` it is
H_tok(θ') = Σ_i w_i S'_i / Σ_i w_i T_i.

`per_decision` (Precup, Sutton, Singh 2000, with a control variate) is unbiased for every η, and its derivative at
η = 0 equals the estimator of `first_order` for every sequence. `weighted_per_decision` normalises the weights at each
position over all sequences; normalising over unfinished sequences only would ignore the change in response lengths and
be biased. `weighted_per_decision` and `snis` are consistent, with a bias of O(1/N).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.functional import Functional, Tokens


class PrefixWeights(NamedTuple):
    """ρ_k and ρ_{k+1} of every token, float64 [K], and w of every sequence, float64 [N]."""

    before_K: Tensor
    after_K: Tensor
    sequence_N: Tensor

    def of(self, functional: Functional) -> Tensor:
        """Return r_k, the weight of f_k, [K]."""
        return self.after_K if functional.of_action else self.before_K


def prefix_weights(logprobs_K: Tensor, moved_logprobs_K: Tensor, offsets_N1: Tensor) -> PrefixWeights:
    """Compute the likelihood ratio of every prefix.

    Args:
        logprobs_K: ℓ at θ, nats, [K].
        moved_logprobs_K: ℓ' at θ', nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Weights, accumulated in float64; exactly 1 if ℓ' = ℓ at all tokens of the prefix.
    """
    log_ratio_K = moved_logprobs_K.double() - logprobs_K.double()
    log_before_K = ragged.sum_before(log_ratio_K, offsets_N1)
    sequence_N = ragged.sequence_sum(log_ratio_K, offsets_N1).exp()
    return PrefixWeights(log_before_K.exp(), (log_before_K + log_ratio_K).exp(), sequence_N)


def per_decision_column(functional: Functional, moved: Tokens, weights: PrefixWeights, base_K: Tensor) -> Tensor:
    """Compute per-sequence terms of the per-decision estimator, whose mean estimates E[F](θ').

    Args:
        functional: F.
        moved: the sequences at θ'.
        weights: `prefix_weights` from θ to θ'.
        base_K: baseline b_k from `baselines.baselines` or `ridge.ridge_baseline`, computed at θ.

    Returns:
        float64 [N].
    """
    growth_K = weights.after_K - weights.before_K
    terms_K = weights.of(functional) * functional.values(moved) - base_K * growth_K
    return ragged.sequence_sum(terms_K, moved.offsets_N1)


class WeightTotals(NamedTuple):
    """Sums of r_k and r_k f'_k at each position [T] and of w by length [T + 1], and the number of sequences [1]."""

    alive_T: Tensor
    values_T: Tensor
    ended_T1: Tensor
    sequences_1: Tensor

    def plus(self, other: "WeightTotals") -> "WeightTotals":
        """Return the totals over the sequences of both blocks."""
        return WeightTotals(*map(ragged.padded_sum, self, other))


def weight_totals(functional: Functional, moved: Tokens, weights: PrefixWeights) -> WeightTotals:
    """Return the totals of a block of sequences that `weighted_per_decision_column` needs; takes the same arguments."""
    lengths_N, weight_K = ragged.lengths(moved.offsets_N1), weights.of(functional)
    ended_T1 = torch.zeros(int(lengths_N.max()) + 1, dtype=torch.float64).index_add_(0, lengths_N, weights.sequence_N)
    return WeightTotals(
        ragged.position_sum(weight_K, moved.offsets_N1),
        ragged.position_sum(weight_K * functional.values(moved), moved.offsets_N1),
        ended_T1,
        torch.tensor([float(len(lengths_N))], dtype=torch.float64),
    )


def weighted_per_decision_column(
    functional: Functional, moved: Tokens, weights: PrefixWeights, totals: WeightTotals | None = None
) -> Tensor:
    """Compute per-sequence terms of the per-decision estimator with weights normalised at each position.

    Args:
        functional: F.
        moved: the sequences at θ'.
        weights: `prefix_weights` from θ to θ'.
        totals: `weight_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [N]: the estimate plus the influence of each sequence, so that mean and standard error are right.
    """
    totals = totals or weight_totals(functional, moved, weights)
    offsets_N1, weight_K = moved.offsets_N1, weights.of(functional)
    position_K, lengths_N = ragged.position_index(offsets_N1), ragged.lengths(offsets_N1)
    # W_k: mean of r_k over all sequences; a finished sequence keeps its w
    W_T = (totals.alive_T + totals.ended_T1.cumsum(0)[:-1]) / totals.sequences_1
    A_T = totals.values_T / totals.sequences_1
    # ψ_i = Σ_k r_ik f'_ik/W_k − Σ_k (A_k/W_k²) r_ik, where r_ik = w_i after the end of sequence i
    slope_T = A_T / W_T**2
    terms_K = weight_K * functional.values(moved)
    own_N = ragged.sequence_sum(terms_K / W_T[position_K] - slope_T[position_K] * weight_K, offsets_N1)
    slope_after_T1 = slope_T.sum() - torch.cat([slope_T.new_zeros(1), slope_T.cumsum(0)])
    return (A_T / W_T).sum() + own_N - weights.sequence_N * slope_after_T1[lengths_N]


def effective_sample_size(weights_N: Tensor) -> float:
    """Return Kish's effective sample size (Σw)²/Σw², between 1 and N."""
    relative_N = weights_N / weights_N.max()  # squares of large weights would overflow
    return float(relative_N.sum() ** 2 / (relative_N**2).sum())


class LogTotals(NamedTuple):
    """Logs of Σρ and Σρ² at each position over sequences that reach it [T], and of Σw and Σw² by length [T + 1]."""

    alive_T: Tensor
    alive_squared_T: Tensor
    ended_T1: Tensor
    ended_squared_T1: Tensor

    def plus(self, other: "LogTotals") -> "LogTotals":
        """Return the totals over the sequences of both blocks."""
        return LogTotals(*map(_padded_logaddexp, self, other))


def log_totals(weights: PrefixWeights, offsets_N1: Tensor) -> LogTotals:
    """Return the totals of a block of sequences that `prefix_effective_sample_sizes` needs.

    Sums are kept as logarithms, because weights at late positions may be many orders of magnitude larger than others.

    Args:
        weights: `prefix_weights` of the block.
        offsets_N1: int64 [N + 1].

    Returns:
        Totals in float64; −inf for positions and lengths without sequences.
    """
    position_K, lengths_N = ragged.position_index(offsets_N1), ragged.lengths(offsets_N1)
    longest = int(lengths_N.max())
    alive_K, ended_N = weights.before_K.log(), weights.sequence_N.log()
    return LogTotals(
        *(_log_sum_by(power * alive_K, position_K, longest) for power in (1, 2)),
        *(_log_sum_by(power * ended_N, lengths_N, longest + 1) for power in (1, 2)),
    )


def prefix_effective_sample_sizes(totals: LogTotals) -> Tensor:
    """Compute Kish's (Σρ)²/Σρ² at each position over all sequences; a finished sequence keeps its w.

    Args:
        totals: `log_totals` over all sequences.

    Returns:
        float64 [T] between 1 and N, where T is the length of the longest sequence; N at the first position.
    """

    def log_sum(alive_T: Tensor, ended_T1: Tensor) -> Tensor:
        return torch.logaddexp(alive_T, ended_T1.logcumsumexp(0)[:-1])

    of_weights_T = log_sum(totals.alive_T, totals.ended_T1)
    of_squares_T = log_sum(totals.alive_squared_T, totals.ended_squared_T1)
    return (2 * of_weights_T - of_squares_T).exp()


def _padded_logaddexp(a_T: Tensor, b_T: Tensor) -> Tensor:
    short, long = sorted((a_T, b_T), key=len)
    return torch.logaddexp(torch.cat([short, long.new_full((len(long) - len(short),), -torch.inf)]), long)


def _log_sum_by(logs: Tensor, index: Tensor, size: int) -> Tensor:
    """Return log Σ exp(logs) over the entries with each index: float64 [size], −inf for an index without entries."""
    largest = logs.new_full((size,), -torch.inf).scatter_reduce(0, index, logs, "amax")
    return largest + logs.new_zeros(size).index_add(0, index, (logs - largest[index]).exp()).log()


def log_weights_are_usable(weights: PrefixWeights) -> bool:
    """Return False if any weight over- or underflowed."""
    return bool(torch.isfinite(weights.after_K).all() and (weights.sequence_N > 0).all())
