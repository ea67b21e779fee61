"""H at θ' = θ + ηv from sequences that were sampled at θ.

Prefix weights ρ_k = Π_{j<k} π_θ'(a_j|s_j)/π_θ(a_j|s_j), ρ_1 = 1; w = ρ_{T+1} is the weight of the whole sequence.

    per_decision   H_seq(θ') = E[ Σ_k ρ_k h'_k − Σ_k b_k (ρ_{k+1} − ρ_k) ]
                   L(θ')     = E[ Σ_k ρ_k − Σ_k c_k (ρ_{k+1} − ρ_k) ],          H_tok = H_seq/L
    weighted_…     H_seq(θ') = Σ_k A_k/W_k, with A_k the mean of ρ_k h'_k and W_k that of ρ_k over *all* sequences, a
                   finished one keeping its w; L(θ') the same with 1 in place of h'
    snis           H_tok(θ') = Σ_i w_i S'_i / Σ_i w_i T_i
                   H_seq(θ') = Σ_i w_i S'_i / Σ_i w_i
    path_integral  see `path_integral`

`per_decision` (Precup, Sutton, Singh 2000, with a control variate) is unbiased for every η, and its derivative at
η = 0 is, sequence by sequence, the estimator of `first_order`. `weighted_per_decision` normalises the weights at each
position (over the sequences still alive it would lose the change of survival, and be biased); it and `snis` are
consistent, with a bias O(1/N).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.first_order import ReturnsToGo

Estimator = Literal["per_decision", "weighted_per_decision", "snis", "path_integral"]


class PrefixWeights(NamedTuple):
    """ρ_k and ρ_{k+1} of every token, float64 [K], and w of every sequence, float64 [N]."""

    before_K: Tensor
    after_K: Tensor
    sequence_N: Tensor


class MovedColumns(NamedTuple):
    """Per-sequence terms, float64 [N], whose means estimate H_seq(θ') and L(θ') by `per_decision`."""

    S_N: Tensor
    T_N: Tensor


def prefix_weights(logprobs_K: Tensor, moved_logprobs_K: Tensor, offsets_N1: Tensor) -> PrefixWeights:
    """Likelihood ratios of every prefix.

    Args:
        logprobs_K: ℓ at θ, nats, [K].
        moved_logprobs_K: ℓ' at θ', nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Weights, accumulated in float64; exactly 1 where the two are equal.
    """
    log_ratio_K = moved_logprobs_K.double() - logprobs_K.double()
    log_before_K = ragged.sum_before(log_ratio_K, offsets_N1)
    sequence_N = ragged.sequence_sum(log_ratio_K, offsets_N1).exp()
    return PrefixWeights(log_before_K.exp(), (log_before_K + log_ratio_K).exp(), sequence_N)


def per_decision_columns(
    weights: PrefixWeights, moved_entropies_K: Tensor, base: ReturnsToGo, offsets_N1: Tensor
) -> MovedColumns:
    """Terms of the per-decision estimator.

    Args:
        weights: of `prefix_weights`.
        moved_entropies_K: h' at θ', nats, [K].
        base: the baselines b_k and c_k of `first_order.baselines`, from the columns at θ.
        offsets_N1: int64 [N + 1].

    Returns:
        Columns, float64 [N].
    """
    growth_K = weights.after_K - weights.before_K
    entropy_K = weights.before_K * moved_entropies_K.double() - base.entropy_K * growth_K
    length_K = weights.before_K - base.length_K * growth_K
    return MovedColumns(ragged.sequence_sum(entropy_K, offsets_N1), ragged.sequence_sum(length_K, offsets_N1))


def weighted_per_decision_columns(
    weights: PrefixWeights, moved_entropies_K: Tensor, offsets_N1: Tensor
) -> MovedColumns:
    """Terms of the per-decision estimator with weights normalised at each position.

    Args:
        weights: of `prefix_weights`.
        moved_entropies_K: h' at θ', nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Columns, float64 [N]: the estimate plus the influence of each sequence, so that mean and spread are right.
    """
    W_T = _normaliser(weights, offsets_N1)

    def column(values_K: Tensor) -> Tensor:
        position_K, N = ragged.position_index(offsets_N1), len(offsets_N1) - 1
        terms_K = weights.before_K * values_K
        A_T = torch.zeros_like(W_T).index_add_(0, position_K, terms_K) / N
        # ψ_i = Σ_k ρ_ik h'_ik/W_k − Σ_k (A_k/W_k²) r_ik, where r_ik = w_i after the end of sequence i
        slope_T = A_T / W_T**2
        own_N = ragged.sequence_sum(terms_K / W_T[position_K] - slope_T[position_K] * weights.before_K, offsets_N1)
        slope_after_N = (slope_T.sum() - torch.cat([slope_T.new_zeros(1), slope_T.cumsum(0)]))[
            ragged.lengths(offsets_N1)
        ]
        return (A_T / W_T).sum() + own_N - weights.sequence_N * slope_after_N

    return MovedColumns(column(moved_entropies_K.double()), column(torch.ones_like(weights.before_K)))


def _normaliser(weights: PrefixWeights, offsets_N1: Tensor) -> Tensor:
    """W_k: mean over all sequences of the weight of their first k tokens, float64 [T]."""
    position_K, lengths_N = ragged.position_index(offsets_N1), ragged.lengths(offsets_N1)
    longest = int(lengths_N.max())
    alive_T = torch.zeros(longest, dtype=torch.float64).index_add_(0, position_K, weights.before_K)
    ended_T = torch.zeros(longest + 1, dtype=torch.float64).index_add_(0, lengths_N, weights.sequence_N).cumsum(0)
    return (alive_T + ended_T[:longest]) / len(lengths_N)


def effective_sample_size(weights_N: Tensor) -> float:
    """Kish's (Σw)²/Σw², between 1 and N."""
    relative_N = weights_N / weights_N.max()  # squares of large weights would overflow
    return float(relative_N.sum() ** 2 / (relative_N**2).sum())


def prefix_effective_sample_sizes(weights: PrefixWeights, offsets_N1: Tensor) -> Tensor:
    """Kish's (Σρ)²/Σρ² at each position, over all sequences: a finished one keeps its w.

    Sums are taken as logarithms: late weights may be so large that early ones would vanish beside them.

    Args:
        weights: of `prefix_weights`.
        offsets_N1: int64 [N + 1].

    Returns:
        Between 1 and N, float64 [T], T the length of the longest sequence; N at the first position.
    """
    position_K, lengths_N = ragged.position_index(offsets_N1), ragged.lengths(offsets_N1)
    longest = int(lengths_N.max())

    def log_sum(power: int) -> Tensor:
        alive_T = _log_sum_by(power * weights.before_K.log(), position_K, longest)
        ended_T = _log_sum_by(power * weights.sequence_N.log(), lengths_N, longest + 1).logcumsumexp(0)
        return torch.logaddexp(alive_T, ended_T[:longest])

    return (2 * log_sum(1) - log_sum(2)).exp()


def _log_sum_by(logs: Tensor, index: Tensor, size: int) -> Tensor:
    """log Σ exp(logs) over the entries with each index: float64 [size], −inf where there are none."""
    largest = logs.new_full((size,), -torch.inf).scatter_reduce(0, index, logs, "amax")
    return largest + logs.new_zeros(size).index_add(0, index, (logs - largest[index]).exp()).log()


def log_weights_are_usable(weights: PrefixWeights) -> bool:
    """Whether no weight over- or underflowed."""
    return bool(torch.isfinite(weights.after_K).all() and (weights.sequence_N > 0).all())
