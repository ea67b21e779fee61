"""ΔH as an integral of derivatives along the step, so that no two nearly equal numbers are subtracted.

    ΔH(η) = η ∫₀¹ ∂_vH(θ + sηv) ds ≈ η Σ_j ω_j ∂_vH(θ + s_jηv)          (Gauss-Legendre nodes s_j, weights ω_j)

The derivative at θ + sηv is estimated from sequences that were sampled at θ, by the derivative of the per-decision
terms: with ρ̇_k = ρ_k Σ_{j<k} ℓ̇'_j,

    ∂_vH_seq = E[ Σ_k (ρ_k ḣ'_k + ρ̇_k h'_k) − Σ_k b_k (ρ̇_{k+1} − ρ̇_k) ],   ∂_vL = E[ Σ_k ρ̇_k − Σ_k c_k (ρ̇_{k+1} − ρ̇_k) ]

Sequence by sequence this is what `per_decision` gives, up to the quadrature; but it stays exact at step sizes where the
difference of two float32 forward passes is only rounding.
"""

from collections.abc import Sequence

from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import ReturnsToGo
from entropy_core.numerics.first_order import FirstOrderColumns
from entropy_core.numerics.importance import PrefixWeights, per_decision_columns
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import Estimate, Normalization, entropy_derivative

NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
"""s_j: three of them integrate ∂_vH exactly while it is a polynomial of degree five in η."""
WEIGHTS = (5 / 18, 8 / 18, 5 / 18)


def derivative_columns(
    weights: PrefixWeights, moved: TokenDerivatives, base: ReturnsToGo, offsets_N1: Tensor
) -> FirstOrderColumns:
    """Per-sequence terms of ∂_vH at a moved policy θ'.

    Args:
        weights: of `importance.prefix_weights`, from θ to θ'.
        moved: ℓ', h', ℓ̇' and ḣ' at θ', each [K].
        base: the baselines b_k and c_k, from the columns at θ.
        offsets_N1: int64 [N + 1].

    Returns:
        Columns, float64 [N]; at θ' = θ those of `first_order.first_order_columns`.
    """
    score_K = moved.dlogprobs_K.double()
    before_K = ragged.sum_before(score_K, offsets_N1)
    growth_K = weights.before_K * before_K  # ρ̇_k
    growth_after_K = weights.after_K * (before_K + score_K)  # ρ̇_{k+1}
    rise_K = growth_after_K - growth_K
    local_N = ragged.sequence_sum(weights.before_K * moved.dentropies_K.double(), offsets_N1)
    future_K = growth_K * moved.entropies_K.double() - base.entropy_K * rise_K
    there = per_decision_columns(weights, moved.entropies_K, base, offsets_N1)
    return FirstOrderColumns(
        x_N=local_N + ragged.sequence_sum(future_K, offsets_N1),
        y_N=ragged.sequence_sum(growth_K - base.length_K * rise_K, offsets_N1),
        x_local_N=local_N,
        S_N=there.S_N,
        T_N=there.T_N,
    )


def entropy_change(at_nodes: Sequence[FirstOrderColumns], eta: float, normalization: Normalization) -> Estimate:
    """ΔH(η) from the columns at the nodes.

    Args:
        at_nodes: of `derivative_columns` at θ + s_jηv, in the order of `NODES`.
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
