"""The gradients of the loss on two halves of U, of which one backward pass over one half is enough for both.

Where the coefficients of the tokens of a half are a multiple of those that the same tokens have in all of U,

    g_A = s_A·x,   g_B = s_B·(g − x)

with g the gradient on all of U and x the part of it that comes from A. This holds where the loss is additive over
prompts up to its denominators, as for most losses: a mean over half as many responses doubles each coefficient. It does
not where what one prompt contributes depends on the others: with advantages whose mean over the batch is subtracted, or
micro-batches that are filled anew. Clipping comes after it: each half has a norm of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.vectors import Block, Lazy

TOLERANCE = 1e-12
"""Largest difference of two coefficients that are equal but for the rounding of float64, relative to the largest."""

ROUNDING = 32
"""Units of rounding of g within which g and x are equal."""


def multiple(of_half: TokenPair, of_whole: TokenPair) -> float | None:
    """Find s, such that the coefficients of the tokens of a half are s times those that they have in all of U.

    Args:
        of_half: coefficients of the loss on the half, each float64 [K].
        of_whole: coefficients of the same tokens in the loss on all of U, each float64 [K].

    Returns:
        s; 0 if the coefficients of the half are all 0; None if there is no such number.
    """
    half, whole = torch.cat(of_half), torch.cat(of_whole)
    if not half.any():
        return 0.0
    square = float(whole @ whole)
    factor = float(half @ whole) / square if square else 0.0
    return factor if (half - factor * whole).abs().max() <= TOLERANCE * half.abs().max() else None


def rest(whole: Mapping[Block, Tensor], part: Mapping[Block, Tensor], dtype: torch.dtype) -> Lazy[Block]:
    """Subtract a part of a gradient from the whole, block by block.

    A difference within the rounding of the whole is 0: a row of the embeddings that no prompt of the rest uses has no
    gradient there, and a rule that divides by |g| would make a whole step of what rounding leaves.

    Args:
        whole: g, float64.
        part: x, float64, with the same blocks.
        dtype: of the arithmetic that both come from, and that g was rounded to.

    Returns:
        g − x, float64, computed on every access.
    """
    least = ROUNDING * torch.finfo(dtype).eps

    def one(block: Block) -> Tensor:
        difference = whole[block] - part[block]
        return difference.masked_fill_(difference.abs() <= least * whole[block].abs(), 0.0)

    return Lazy(list(part), one)
