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

Sequences may come from another law q than the policy at θ. Then q takes the place of π_θ in the denominators, here and
in `path_integral`, and E[F](θ) itself is estimated in the same way, with the weights W of `weights.sampling_weights`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.functional import Functional, Tokens
from entropy_core.numerics.weights import PrefixWeights


def per_decision_column(functional: Functional, moved: Tokens, weights: PrefixWeights, base_K: Tensor) -> Tensor:
    """Compute per-sequence terms of the per-decision estimator, whose mean estimates E[F](θ').

    Args:
        functional: F.
        moved: the sequences at θ'.
        weights: `weights.prefix_weights` from θ to θ'.
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

    @classmethod
    def of(cls, weights_K: Tensor, values_K: Tensor, ended_N: Tensor, offsets_N1: Tensor) -> "WeightTotals":
        """Sum weights and weighted values of tokens, [K], by position, and weights of sequences, [N], by length."""
        lengths_N = ragged.lengths(offsets_N1)
        ended_T1 = torch.zeros(int(lengths_N.max()) + 1, dtype=torch.float64).index_add_(0, lengths_N, ended_N)
        sequences_1 = torch.tensor([float(len(lengths_N))], dtype=torch.float64)
        weights_T, values_T = (ragged.position_sum(column_K, offsets_N1) for column_K in (weights_K, values_K))
        return cls(weights_T, values_T, ended_T1, sequences_1)

    @property
    def weight_T(self) -> Tensor:
        """W_k, the mean weight over all sequences; a finished sequence keeps its w."""
        return (self.alive_T + self.ended_T1.cumsum(0)[:-1]) / self.sequences_1

    @property
    def value_T(self) -> Tensor:
        """A_k, the mean weighted value over all sequences."""
        return self.values_T / self.sequences_1

    def plus(self, other: "WeightTotals") -> "WeightTotals":
        """Return the totals over the sequences of both blocks."""
        return WeightTotals(*map(ragged.padded_sum, self, other))


def weight_totals(functional: Functional, moved: Tokens, weights: PrefixWeights) -> WeightTotals:
    """Return the totals of a block of sequences that `weighted_per_decision_column` needs; takes the same arguments."""
    weight_K = weights.of(functional)
    return WeightTotals.of(weight_K, weight_K * functional.values(moved), weights.sequence_N, moved.offsets_N1)


def weighted_per_decision_column(
    functional: Functional, moved: Tokens, weights: PrefixWeights, totals: WeightTotals | None = None
) -> Tensor:
    """Compute per-sequence terms of the per-decision estimator with weights normalised at each position.

    Args:
        functional: F.
        moved: the sequences at θ'.
        weights: `weights.prefix_weights` from θ to θ'.
        totals: `weight_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [N]: the estimate plus the influence of each sequence, so that mean and standard error are right.
    """
    totals = totals or weight_totals(functional, moved, weights)
    offsets_N1, weight_K = moved.offsets_N1, weights.of(functional)
    position_K, W_T, A_T = ragged.position_index(offsets_N1), totals.weight_T, totals.value_T
    # ψ_i = Σ_k r_ik f'_ik/W_k − Σ_k (A_k/W_k²) r_ik, where r_ik = w_i after the end of sequence i
    slope_T = A_T / W_T**2
    terms_K = weight_K * functional.values(moved)
    W_K, slope_K = (of_T.index_select(0, position_K) for of_T in (W_T, slope_T))
    own_N = ragged.sequence_sum(terms_K / W_K - slope_K * weight_K, offsets_N1)
    return (A_T / W_T).sum() + own_N - weights.sequence_N * sum_after_end(slope_T, offsets_N1)


def sum_after_end(values_T: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return, for each sequence, the sum of values over the positions that it does not reach, float64 [N]."""
    after_T1 = values_T.sum() - torch.cat([values_T.new_zeros(1), values_T.cumsum(0)])
    return after_T1[ragged.lengths(offsets_N1)]


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
        weights: `weights.prefix_weights` of the block.
        offsets_N1: int64 [N + 1].

    Returns:
        Totals in float64; −inf for positions and lengths without sequences.
    """
    position_K, lengths_N = ragged.position_index(offsets_N1), ragged.lengths(offsets_N1)
    longest = int(lengths_N.max())
    alive_K, ended_N = weights.before_K.log(), weights.sequence_N.log()
    return LogTotals(*_log_sums_by(alive_K, position_K, longest), *_log_sums_by(ended_N, lengths_N, longest + 1))


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


def _log_sums_by(logs: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return log Σ w and log Σ w² over the entries w with each index: float64 [size], −inf for one without entries."""
    largest = logs.new_full((size,), -torch.inf).scatter_reduce(0, index, logs, "amax")
    scaled = (logs - largest.index_select(0, index)).exp()
    sums = (logs.new_zeros(size).index_add_(0, index, of_power) for of_power in (scaled, scaled.square()))
    of_weights, of_squares = (total.log() for total in sums)
    return largest + of_weights, 2 * largest + of_squares
