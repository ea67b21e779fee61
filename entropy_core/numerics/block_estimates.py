"""Estimates from a few independent blocks of the evaluation batch E, and how errors of several sources combine.

A block gives a_b = ⟨∇H_seq, v⟩, l_b = ⟨∇L, v⟩, its entropy per token H_b and its mean length L_b. All of E is the mean
with the numbers of sequences n_b as weights, and the spread of what is left without one block is the error over E.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ratio_slope


class Blocks(NamedTuple):
    """Sizes of the blocks, and entropy and length of each: float64 [B]."""

    sequences_B: Tensor
    H_tok_B: Tensor
    mean_length_B: Tensor

    @classmethod
    def from_summaries(cls, blocks: Sequence[Mapping[str, Any]]) -> "Blocks":
        """From `sequences`, `H_tok` and `mean_length` of each."""
        columns = ([block[name] for block in blocks] for name in ("sequences", "H_tok", "mean_length"))
        return cls(*(torch.tensor(column, dtype=torch.float64) for column in columns))

    def part(self, chosen: slice) -> "Blocks":
        """Some of the blocks."""
        return Blocks(*(column_B[chosen] for column_B in self))


class FromBlocks(NamedTuple):
    """A value with its standard error over E and the degrees of freedom of that."""

    value: float
    standard_error: float
    degrees_of_freedom: float


def derivative(along_KB: Tensor, blocks: Blocks, normalization: Normalization) -> FromBlocks:
    """Estimate ⟨∇H, v⟩ and its delete-one-block jackknife error over E; v may be a difference of two steps.

    Args:
        along_KB: ⟨∇H_seq, v⟩ and ⟨∇L, v⟩ on every block, float64 [2, B].
        blocks: the blocks.
        normalization: per token or per sequence.

    Returns:
        Nats per unit step; the error is NaN for fewer than two blocks.
    """
    B = len(blocks.sequences_B)
    kept_BB = torch.ones(B, B, dtype=torch.float64) - torch.eye(B, dtype=torch.float64)
    value = _mean(along_KB, blocks, torch.ones(1, B, dtype=torch.float64), normalization)
    if B < 2:
        return FromBlocks(float(value), float("nan"), 0.0)
    without_B = _mean(along_KB, blocks, kept_BB, normalization)
    variance = (B - 1) / B * float(((without_B - without_B.mean()) ** 2).sum())
    return FromBlocks(float(value), variance**0.5, float(B - 1))


def _mean(along_KB: Tensor, blocks: Blocks, kept_RB: Tensor, normalization: Normalization) -> Tensor:
    """⟨∇H, v⟩ from some of the blocks, for each of R choices, [R]."""
    weights_RB = kept_RB * blocks.sequences_B
    weights_RB = weights_RB / weights_RB.sum(1, keepdim=True)
    entropy_R, length_R = (weights_RB @ along_B for along_B in along_KB)
    if normalization == "per_sequence":
        return entropy_R
    L_R = weights_RB @ blocks.mean_length_B
    H_R = weights_RB @ (blocks.H_tok_B * blocks.mean_length_B) / L_R
    return ratio_slope(entropy_R, length_R, H_R, L_R)


class Error(NamedTuple):
    """A standard error and its degrees of freedom."""

    standard_error: float
    degrees_of_freedom: float


def combined(errors: Sequence[Error]) -> Error:
    """Add independent errors: √Σ SE², with the Welch-Satterthwaite degrees of freedom.

    Args:
        errors: at least one; one of 0 counts for nothing.

    Returns:
        The error of the sum.
    """
    variances = [error.standard_error**2 for error in errors]
    total = sum(variances)
    if total == 0.0:
        return Error(0.0, max(error.degrees_of_freedom for error in errors))
    parts = zip(variances, errors, strict=True)
    return Error(total**0.5, total**2 / sum(v**2 / error.degrees_of_freedom for v, error in parts if v))
