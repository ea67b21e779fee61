"""∂_vH from per-token columns: what one step does to the entropy, to first order.

    ∂_vH_seq = E[ Σ_k ḣ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} h_j
    ∂_vL     = E[ Σ_k (T − k − c_k) ℓ̇_k ]
    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L

R_k starts after k because h_k does not depend on a_k. The baselines b_k, c_k may depend on the prefix and on other
sequences only, so they leave the mean unchanged (the score ℓ̇_k has mean zero given its prefix).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged

Baseline = Literal["none", "time_loo"]


class ReturnsToGo(NamedTuple):
    """What is still to come after each step: entropy R_k (nats) and number of tokens T − k, float64 [K]."""

    entropy_K: Tensor
    length_K: Tensor


class FirstOrderColumns(NamedTuple):
    """Per-sequence terms, float64 [N]: x and y estimate ∂_vH_seq and ∂_vL; S and T the entropy and length."""

    x_N: Tensor
    y_N: Tensor
    x_local_N: Tensor  # Σ_k ḣ_k, the part of x without the score function
    S_N: Tensor
    T_N: Tensor


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


def time_loo_baseline(values_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """At each step, the mean of `values` over the *other* sequences that are alive at that step.

    Args:
        values_K: [K].
        offsets_N1: int64 [N + 1].

    Returns:
        float64 [K]; 0 where no other sequence is alive.
    """
    position_K = ragged.position_index(offsets_N1)
    longest = int(position_K.max()) + 1 if len(position_K) else 0
    total_T = torch.zeros(longest, dtype=torch.float64).index_add_(0, position_K, values_K.double())
    others_K = torch.bincount(position_K, minlength=longest)[position_K] - 1
    mean_K = (total_T[position_K] - values_K.double()) / others_K.clamp_min(1)
    return torch.where(others_K > 0, mean_K, 0.0)


def baselines(returns: ReturnsToGo, offsets_N1: Tensor, baseline: Baseline) -> ReturnsToGo:
    """b_k (of the entropy to come) and c_k (of the length to come).

    Args:
        returns: of every token.
        offsets_N1: int64 [N + 1].
        baseline: `none`, or `time_loo`: the mean over the other sequences alive at the same step.

    Returns:
        Two float64 tensors [K].
    """
    if baseline == "none":
        return ReturnsToGo(torch.zeros_like(returns.entropy_K), torch.zeros_like(returns.length_K))
    return ReturnsToGo(*(time_loo_baseline(values_K, offsets_N1) for values_K in returns))


def score_coefficients(entropies_K: Tensor, offsets_N1: Tensor, baseline: Baseline) -> ReturnsToGo:
    """R_k − b_k and T − k − c_k: what multiplies the score ℓ̇_k.

    Args:
        entropies_K: h, nats, [K].
        offsets_N1: int64 [N + 1].
        baseline: see `baselines`.

    Returns:
        Two float64 tensors [K].
    """
    returns = returns_to_go(entropies_K, offsets_N1)
    base = baselines(returns, offsets_N1, baseline)
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
    coefficients = score_coefficients(entropies_K, offsets_N1, baseline)
    local_N = ragged.sequence_sum(dentropies_K, offsets_N1)
    score_K = dlogprobs_K.double()
    return FirstOrderColumns(
        x_N=local_N + ragged.sequence_sum(coefficients.entropy_K * score_K, offsets_N1),
        y_N=ragged.sequence_sum(coefficients.length_K * score_K, offsets_N1),
        x_local_N=local_N,
        S_N=ragged.sequence_sum(entropies_K, offsets_N1),
        T_N=ragged.lengths(offsets_N1).double(),
    )
