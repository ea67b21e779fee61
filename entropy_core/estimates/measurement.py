"""Terms of the estimators of the entropy change ΔH, from E at θ and at θ + ηv, block by block.

    Moved       E at θ + ηv, with the step v per unit of learning rate and the step size η
    measured    terms of an estimator, for each functional

ℓ is the log-probability of a token and h its entropy, in nats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.estimates.blocks import added, laid_out
from entropy_core.estimates.evaluation import Bases, EvaluationBatch
from entropy_core.numerics import importance, path_integral, ragged
from entropy_core.numerics.choices import Estimator
from entropy_core.numerics.functional import Columns, Functional, TokenPair, Tokens
from entropy_core.numerics.importance import WeightTotals
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import PrefixWeights, log_weights_are_usable, prefix_weights


class MovedTokens(NamedTuple):
    """A block of E at θ + ηv: ℓ and h there, or derivatives at the nodes of the path integral, or both; each [K]."""

    logprobs_K: Tensor | None = None
    entropies_K: Tensor | None = None
    at_nodes: tuple[TokenDerivatives, ...] = ()


class Moved(NamedTuple):
    """E at θ + ηv; `read` iterates over the same blocks as the `EvaluationBatch`."""

    eta: float
    read: Callable[[], Iterable[MovedTokens]]


class Measured(NamedTuple):
    """Per-sequence terms of an estimator of ΔH, each [N].

    Args:
        columns: by functional, the terms of its value at θ + ηv; for `path_integral`, the terms of its derivative at
            each node; None for η = 0.
        weights_N: importance weights of whole sequences, from the law that drew them to θ + ηv; for `path_integral`, to
            its last node.
        usable: False if a weight over- or underflowed.
        ess_prefix: smallest effective sample size of the prefix weights at any position.
    """

    columns: tuple[dict[Functional, Columns], ...] | dict[Functional, Tensor] | None
    weights_N: Tensor
    usable: bool
    ess_prefix: float


def measured(batch: EvaluationBatch, moved: Moved, estimator: Estimator) -> Measured:
    """Compute the terms of one estimator of E[F] at θ + ηv; see `numerics.importance`.

    Args:
        batch: E at θ.
        moved: E at θ + ηv.
        estimator: name of the estimator.

    Returns:
        The terms per sequence, and the importance weights.
    """
    if moved.eta == 0:
        return Measured(None, batch.sampling.weights_N, True, batch.sampling.ess_prefix)

    def blocks() -> Iterator[tuple[Tokens, Bases, MovedTokens]]:
        for (tokens, bases), moved_block in zip(batch.read(), moved.read(), strict=True):
            yield tokens, bases, moved_block

    totals: Mapping[Functional, WeightTotals] = {}
    if estimator == "weighted_per_decision":
        of_blocks = (_at_theta_prime(tokens, moved_block) for tokens, _, moved_block in blocks())
        totals = added({f: importance.weight_totals(f, *block) for f in batch.functionals} for block in of_blocks)
    columns, whole, logs, usable = [], [], None, True
    for tokens, bases, moved_block in blocks():
        found, weights = _of_block(tokens, bases, moved_block, estimator, totals)
        columns.append(found)
        whole.append(weights.sequence_N)
        usable = usable and log_weights_are_usable(weights)
        of_block = importance.log_totals(weights, tokens.offsets_N1)
        logs = of_block if logs is None else logs.plus(of_block)
    assert logs is not None
    ess_prefix = float(importance.prefix_effective_sample_sizes(logs).min()) if usable else 0.0
    terms = (
        tuple(laid_out(of_node) for of_node in zip(*columns, strict=True))
        if estimator == "path_integral"
        else laid_out(columns)
    )
    return Measured(terms, torch.cat(whole), usable, ess_prefix)


def _of_block(
    tokens: Tokens,
    bases: Bases,
    moved_block: MovedTokens,
    estimator: Estimator,
    totals: Mapping[Functional, WeightTotals],
) -> tuple[Any, PrefixWeights]:
    if estimator == "path_integral":
        at_nodes = [
            _at(tokens, node.logprobs_K, node.entropies_K, TokenPair(*node[2:])) for node in moved_block.at_nodes
        ]
        of_nodes = [
            {f: path_integral.derivative_columns(f, *of_node, base_K) for f, base_K in bases.items()}
            for of_node in at_nodes
        ]
        return of_nodes, at_nodes[-1][1]
    moved, weights = _at_theta_prime(tokens, moved_block)
    if estimator == "per_decision":
        return {f: importance.per_decision_column(f, moved, weights, base_K) for f, base_K in bases.items()}, weights
    if estimator == "weighted_per_decision":
        return {f: importance.weighted_per_decision_column(f, moved, weights, totals[f]) for f in bases}, weights
    return {f: ragged.sequence_sum(f.values(moved), tokens.offsets_N1) for f in bases}, weights


def _at_theta_prime(tokens: Tokens, moved_block: MovedTokens) -> tuple[Tokens, PrefixWeights]:
    assert moved_block.logprobs_K is not None and moved_block.entropies_K is not None
    return _at(tokens, moved_block.logprobs_K, moved_block.entropies_K)


def _at(
    tokens: Tokens, logprobs_K: Tensor, entropies_K: Tensor, along: TokenPair | None = None
) -> tuple[Tokens, PrefixWeights]:
    """Return a block with ℓ and h under another policy, and the importance weights to that policy."""
    drawn_K = tokens.drawn_logprobs_K
    moved = tokens._replace(logprobs_K=logprobs_K, entropies_K=entropies_K, along=along, proposal_logprobs_K=drawn_K)
    return moved, prefix_weights(drawn_K, logprobs_K, tokens.offsets_N1)
