"""Combine results from two independent halves of the evaluation batch E into results for all of E."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import FUNCTIONALS, ratio_slope

KINDS, HALVES = tuple(functional.name for functional in FUNCTIONALS), (0, 1)


def of_all(halves: Sequence[Mapping[str, Any]], values: Sequence[Tensor]) -> Tensor:
    """Average the means of the two halves, weighted by their numbers of sequences.

    Args:
        halves: `summary["halves"]` of entropy-gradient.
        values: mean over each half, any shape.

    Returns:
        The mean over all of E.
    """
    N = sum(half["sequences"] for half in halves)
    first, second = (half["sequences"] / N * value for half, value in zip(halves, values, strict=True))
    return first + second


def entropy_and_length(halves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Compute the entropy per token H_tok and the mean length L over all of E.

    Args:
        halves: `summary["halves"]` of entropy-gradient.

    Returns:
        H_tok in nats per token, and L in tokens.
    """
    tokens = [half["sequences"] * half["mean_length"] for half in halves]
    entropy = sum(half["H_tok"] * count for half, count in zip(halves, tokens, strict=True))
    return entropy / sum(tokens), sum(tokens) / sum(half["sequences"] for half in halves)


def by_normalization(along: Sequence[Tensor], H_tok: float, mean_length: float) -> dict[Normalization, Tensor]:
    """Evaluate a linear function of ∇H for both normalisations, with ∇H_tok = (∇H_seq − H_tok·∇L)/L.

    Args:
        along: values of the function at ∇H_seq and at ∇L (the order of `KINDS`), of equal shape.
        H_tok: nats per token.
        mean_length: L, tokens.

    Returns:
        Value of the function at ∇H, by normalisation.
    """
    entropy, length = along
    return {"per_token": ratio_slope(entropy, length, H_tok, mean_length), "per_sequence": entropy}
