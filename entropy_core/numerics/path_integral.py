"""The entropy change ΔH as an integral of derivatives along the step, which avoids subtracting nearly equal numbers.

    ΔH(η) = η ∫₀¹ ∂_vH(θ + sηv) ds ≈ η Σ_j ω_j ∂_vH(θ + s_jηv)          (Gauss-Legendre nodes s_j, weights ω_j)

The derivative at θ + sηv is estimated from sequences sampled at θ, by differentiating the per-decision terms of entropy
and length. With the notation of `importance` and ρ̇_k = ρ_k Σ_{j<k} ℓ̇'_j,

    ∂_vE[F] = E[ Σ_k (r_k ḟ'_k + ṙ_k f'_k) − Σ_k b_k (ρ̇_{k+1} − ρ̇_k) ]

For every sequence the result equals that of `per_decision` up to quadrature error. It stays accurate at step sizes so
small that the difference of two float32 forward passes is only rounding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import Columns, Functional, Tokens
from entropy_core.numerics.importance import per_decision_column
from entropy_core.numerics.quadrature import WEIGHTS
from entropy_core.numerics.uncertainty import Estimate, entropy_derivative
from entropy_core.numerics.weights import PrefixWeights


def derivative_columns(functional: Functional, moved: Tokens, weights: PrefixWeights, base_K: Tensor) -> Columns:
    """Compute per-sequence terms of ∂_vE[F] at parameters θ'.

    Args:
        functional: F.
        moved: the sequences at θ', with derivatives at θ'.
        weights: `weights.prefix_weights` from θ to θ'.
        base_K: baseline b_k, computed at θ.

    Returns:
        Columns, float64 [N]; equal to `first_order.first_order_columns` if θ' = θ.
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
    """Estimate ΔH(η) from the columns at the nodes.

    Args:
        at_nodes: `derivative_columns` of entropy and length at each θ + s_jηv, in the order of `NODES`.
        eta: η.
        normalization: per sequence or per token.

    Returns:
        ΔH in nats per sequence or per token.
    """
    total: Estimate | None = None
    for weight, columns in zip(WEIGHTS, at_nodes, strict=True):
        part = entropy_derivative(columns, normalization).scaled(eta * weight)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total
