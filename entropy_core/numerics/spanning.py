"""Which of several losses need a backward pass: a gradient is linear in the coefficients of the tokens.

    Σ_k c_k ∇ℓ_k + d_k ∇h_k = Σ_b m_b g_b   wherever   (c, d) = Σ_b m_b (c, d)_b

Among interventions such relations are common: positive and negative advantages add up to all of them, two weights of
the entropy bonus give every other one, and advantages without a scale are a multiple of those with one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_core.numerics.half_gradients import ROUNDING

TOLERANCE = 1e-11
"""What is left of a row of length 1 that depends on others, by the rounding of float64."""

MOST_NUMBERS = 2**25
"""Coefficients in all up to which relations are looked for: more take memory that passes over U need."""

LARGEST = 2.0
"""Largest multiple of one gradient in another, both with coefficients of length 1: what rounding is multiplied by."""


def spanning(rows: Sequence[Tensor], costs: Sequence[float]) -> tuple[list[int], Tensor]:
    """Choose rows of which all others are linear combinations, the cheapest that do not multiply rounding.

    Args:
        rows: the coefficients of each loss, [K], float64; where one is not finite or too large, all are chosen.
        costs: of computing the gradient of each.

    Returns:
        Places of the chosen rows, B in all, and the multiples of them that give each row, float64 [I, B].
    """
    count, norms_I = len(rows), torch.stack([row_K.norm() for row_K in rows])
    if count * len(rows[0]) > MOST_NUMBERS or not norms_I.isfinite().all():
        return list(range(count)), torch.eye(count, dtype=torch.float64)
    units_IK = torch.stack(list(rows))
    units_IK /= norms_I.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    chosen: list[int] = []
    axes_BK = units_IK.new_empty(0, units_IK.shape[1])
    for place in sorted(range(len(costs)), key=lambda place: costs[place]):
        left_K = units_IK[place]
        for _ in range(2):  # once leaves the rounding of what it takes away
            left_K = left_K - axes_BK.T @ (axes_BK @ left_K)
        if left_K.norm() > TOLERANCE:
            chosen.append(place)
            axes_BK = torch.cat([axes_BK, left_K[None] / left_K.norm()])
    places_IB = units_IK @ axes_BK.T
    while chosen:
        multiples_IB = torch.linalg.solve(places_IB[chosen], places_IB, left=False)
        largest, at = multiples_IB.abs().flatten().max(0)
        if largest <= LARGEST:
            multiples_IB[multiples_IB.abs() <= TOLERANCE] = 0.0
            return chosen, multiples_IB * norms_I[:, None] / norms_I[chosen]
        row, column = divmod(int(at), len(chosen))
        chosen[column] = row  # which spans at least twice the volume, so that this ends
    return [], units_IK.new_zeros(count, 0)


def combined(multiples_B: Tensor, gradients: Sequence[Tensor], into: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up multiples of gradients. A sum within the rounding of its terms is 0, as in `half_gradients.rest`.

    Args:
        multiples_B: one for each gradient, float64.
        gradients: of one parameter, float64.
        into: zeros of the same shape, float64, which become the sum.
        dtype: of the arithmetic that the gradients come from.

    Returns:
        The sum.
    """
    size = torch.zeros_like(into)
    for multiple, gradient in zip(multiples_B.tolist(), gradients, strict=True):
        if multiple:
            into.add_(gradient, alpha=multiple)
            size.add_(gradient.abs(), alpha=abs(multiple))
    return into.masked_fill_(into.abs() <= ROUNDING * torch.finfo(dtype).eps * size, 0.0)
