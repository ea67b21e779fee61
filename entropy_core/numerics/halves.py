"""Two independent halves of E, and what holds for all of it, given what holds for each."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import FUNCTIONALS, ratio_slope

KINDS, HALVES = tuple(functional.name for functional in FUNCTIONALS), (0, 1)


def of_all(halves: Sequence[Mapping[str, Any]], values: Sequence[Tensor]) -> Tensor:
    """The mean over all of E of what is a mean over each half.

    Args:
        halves: `summary["halves"]` of entropy-gradient.
        values: of each half, any shape.

    Returns:
        The mean, weighted by the numbers of sequences.
    """
    N = sum(half["sequences"] for half in halves)
    first, second = (half["sequences"] / N * value for half, value in zip(halves, values, strict=True))
    return first + second


def entropy_and_length(halves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """H_tok and L of all of E.

    Args:
        halves: `summary["halves"]` of entropy-gradient.

    Returns:
        Nats per token, and tokens.
    """
    tokens = [half["sequences"] * half["mean_length"] for half in halves]
    entropy = sum(half["H_tok"] * count for half, count in zip(halves, tokens, strict=True))
    return entropy / sum(tokens), sum(tokens) / sum(half["sequences"] for half in halves)


def by_normalization(along: Sequence[Tensor], H_tok: float, mean_length: float) -> dict[Normalization, Tensor]:
    """What is linear in ∇H, from its values along ∇H_seq and along ∇L: ∇H_tok = (∇H_seq − H_tok·∇L)/L.

    Args:
        along: the two values, in the order of `KINDS`, of any one shape.
        H_tok: nats per token.
        mean_length: L, tokens.

    Returns:
        One tensor per normalisation.
    """
    entropy, length = along
    return {"per_token": ratio_slope(entropy, length, H_tok, mean_length), "per_sequence": entropy}
