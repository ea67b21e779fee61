"""ΔH as an integral of derivatives along the step, so that no two nearly equal numbers are subtracted.

    ΔH(η) = η ∫₀¹ ∂_vH(θ + sηv) ds ≈ η Σ_j ω_j ∂_vH(θ + s_jηv)          (Gauss-Legendre nodes s_j, weights ω_j)

The derivative at θ + sηv is estimated from sequences that were sampled at θ, by the derivative of the per-decision
terms of a functional, of the entropy as of the length: with ρ̇_k = ρ_k Σ_{j<k} ℓ̇'_j, and r_k the one of ρ_k and ρ_{k+1}
that f_k is weighted with,

    ∂_vE[F] = E[ Σ_k (r_k ḟ'_k + ṙ_k f'_k) − Σ_k b_k (ρ̇_{k+1} − ρ̇_k) ]

Sequence by sequence this is what `per_decision` gives, up to the quadrature; but it stays exact at step sizes where the
difference of two float32 forward passes is only rounding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import Columns, Functional, Tokens
from entropy_core.numerics.importance import PrefixWeights, per_decision_column
from entropy_core.numerics.quadrature import WEIGHTS
from entropy_core.numerics.uncertainty import Estimate, entropy_derivative


def derivative_columns(functional: Functional, moved: Tokens, weights: PrefixWeights, base_K: Tensor) -> Columns:
    """Per-sequence terms of ∂_vE[F] at a moved policy θ'.

    Args:
        functional: see `functional`.
        moved: the sequences at θ', with their derivatives there.
        weights: of `importance.prefix_weights`, from θ to θ'.
        base_K: the baseline b_k, from the tokens at θ.

    Returns:
        Columns, float64 [N]; at θ' = θ those of `first_order.first_order_columns`.
    """
    offsets_N1, score_K = moved.offsets_N1, moved.derivative.logprob_K
    before_K = ragged.sum_before(score_K, offsets_N1)
    growth_K = weights.before_K * before_K  # ρ̇_k
    growth_after_K = weights.after_K * (before_K + score_K)  # ρ̇_{k+1}
    rise_K = growth_after_K - growth_K
    growth_of_weight_K = growth_after_K if functional.of_action else growth_K
    local_N = ragged.sequence_sum(weights.of(functional) * functional.derivative(moved), offsets_N1)
    future_K = growth_of_weight_K * functional.values(moved) - base_K * rise_K
    return Columns(
        total_N=per_decision_column(functional, moved, weights, base_K),
        derivative_N=local_N + ragged.sequence_sum(future_K, offsets_N1),
        local_N=local_N,
    )


def entropy_change(
    at_nodes: Sequence[Mapping[Functional, Columns]], eta: float, normalization: Normalization
) -> Estimate:
    """ΔH(η) from the columns at the nodes.

    Args:
        at_nodes: of `derivative_columns` at θ + s_jηv, of entropy and length, in the order of `NODES`.
        eta: η.
        normalization: per sequence or per token.

    Returns:
        The estimate, in nats (per token).
    """
    total: Estimate | None = None
    for weight, columns in zip(WEIGHTS, at_nodes, strict=True):
        part = entropy_derivative(columns, normalization).scaled(eta * weight)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total
