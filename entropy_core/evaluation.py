"""E block by block: what its tokens come to, a few numbers for each sequence.

The tokens of one block of sequences (a shard) are in memory at a time, so a batch may be as large as the disk. What a
sequence must know of the others are sums at each position, which are taken in a reading of their own.

    EvaluationBatch   E at θ
    Moved             E at θ + ηv
    measured          what an estimator of ΔH makes of the two
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import baselines, first_order, importance, path_integral, ragged, ridge, uncertainty
from entropy_core.numerics.baselines import Baseline, BaselineTotals, ReturnsToGo
from entropy_core.numerics.first_order import FirstOrderColumns, WeightedTotals
from entropy_core.numerics.importance import MovedColumns, PrefixWeights, WeightTotals
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import Estimate


class Tokens(NamedTuple):
    """A block of sequences at θ: per-token columns [K], and offsets [N + 1]."""

    logprobs_K: Tensor
    entropies_K: Tensor
    dlogprobs_K: Tensor
    dentropies_K: Tensor
    offsets_N1: Tensor

    @property
    def returns(self) -> ReturnsToGo:
        """Entropy and length to come."""
        return baselines.returns_to_go(self.entropies_K, self.offsets_N1)

    def first(self, sequences: int) -> "Tokens":
        """The first of them."""
        offsets_N1 = self.offsets_N1[: sequences + 1]
        count = int(offsets_N1[-1])
        return Tokens(
            self.logprobs_K[:count],
            self.entropies_K[:count],
            self.dlogprobs_K[:count],
            self.dentropies_K[:count],
            offsets_N1,
        )


class EvaluationBatch:
    """What is known of E at θ, and the units that count as independent.

    Args:
        read: the blocks, each with its baselines; called for every reading.
        clusters_N: the independent unit of each sequence; None where sequences are independent.
    """

    def __init__(self, read: Callable[[], Iterable[tuple[Tokens, ReturnsToGo]]], clusters_N: Tensor | None) -> None:
        self.read, self.clusters_N = read, clusters_N

    @classmethod
    def of(
        cls, blocks: Sequence[Callable[[], Tokens]], clusters_N: Tensor | None, baseline: Baseline
    ) -> "EvaluationBatch":
        """E with a baseline of the reward-to-go.

        Args:
            blocks: each reads the tokens of some sequences.
            clusters_N: the independent unit of each sequence; None where sequences are independent.
            baseline: see `baselines.baselines`.

        Returns:
            The batch.
        """
        fitted = _ridge if baseline == "ridge" else _by_position
        base_of = fitted(blocks, clusters_N, baseline)

        def read() -> Iterator[tuple[Tokens, ReturnsToGo]]:
            for i, block in enumerate(blocks):
                tokens = block()
                yield tokens, base_of(i, tokens)

        return cls(read, clusters_N)

    def first(self, sequences: int) -> "EvaluationBatch":
        """The first of its sequences, with the baselines that they have in the whole."""

        def read() -> Iterator[tuple[Tokens, ReturnsToGo]]:
            left = sequences
            for tokens, base in self.read():
                part = tokens.first(min(left, len(tokens.offsets_N1) - 1))
                yield part, ReturnsToGo(*(column_K[: len(part.entropies_K)] for column_K in base))
                left -= len(part.offsets_N1) - 1
                if not left:
                    return

        return EvaluationBatch(read, None if self.clusters_N is None else self.clusters_N[:sequences])

    @cached_property
    def columns(self) -> FirstOrderColumns:
        """Per-sequence terms of ∂_vH."""
        return _laid_out(first_order.columns_given(base, *tokens[1:]) for tokens, base in self.read())

    @cached_property
    def weighted_columns(self) -> FirstOrderColumns:
        """The same of the estimator whose weights are normalised at each position."""
        of_blocks = (first_order.weighted_totals(t.entropies_K, t.dlogprobs_K, t.offsets_N1) for t, _ in self.read())
        totals = reduce(WeightedTotals.plus, of_blocks)
        return _laid_out(first_order.weighted_columns(*tokens[1:], totals) for tokens, _ in self.read())

    @cached_property
    def score_N(self) -> Tensor:
        """Σ_k ℓ̇_k of each sequence."""
        return torch.cat([ragged.sequence_sum(tokens.dlogprobs_K, tokens.offsets_N1) for tokens, _ in self.read()])

    def __len__(self) -> int:
        return len(self.columns.T_N)

    @property
    def units(self) -> int:
        """Number of independent units."""
        return len(self) if self.clusters_N is None else len(self.clusters_N.unique())

    def standard_error(self, estimate: Estimate) -> float:
        """Of an estimate on this batch, with the update held fixed."""
        return uncertainty.standard_error(estimate.influence_N, self.clusters_N)


class MovedTokens(NamedTuple):
    """A block of E at θ + ηv: ℓ' and h', or the derivatives at the nodes of the path, or both; each [K]."""

    logprobs_K: Tensor | None = None
    entropies_K: Tensor | None = None
    at_nodes: tuple[TokenDerivatives, ...] = ()


class Moved(NamedTuple):
    """E at θ + ηv: reads the blocks that those of the batch have become."""

    eta: float
    read: Callable[[], Iterable[MovedTokens]]


class Measured(NamedTuple):
    """What an estimator of ΔH made of a batch, per sequence [N]; no columns where nothing was moved.

    Args:
        columns: by node of the path for `path_integral`, else of θ + ηv.
        weights_N: w of whole sequences; for `path_integral` at its last node.
        usable: whether no weight over- or underflowed.
        ess_prefix: the least effective sample size of the prefixes.
    """

    columns: tuple[FirstOrderColumns, ...] | MovedColumns | None
    weights_N: Tensor
    usable: bool
    ess_prefix: float


def measured(batch: EvaluationBatch, moved: Moved, estimator: importance.Estimator) -> Measured:
    """E at θ + ηv, by one estimator; see `importance`.

    Args:
        batch: E at θ.
        moved: E at θ + ηv.
        estimator: of ΔH.

    Returns:
        Its terms, and the weights.
    """
    if moved.eta == 0:
        return Measured(None, torch.ones(len(batch), dtype=torch.float64), True, float(len(batch)))

    def blocks() -> Iterator[tuple[Tokens, ReturnsToGo, MovedTokens]]:
        for (tokens, base), there in zip(batch.read(), moved.read(), strict=True):
            yield tokens, base, there

    totals = None
    if estimator == "weighted_per_decision":
        of_blocks = (
            importance.weight_totals(*_at_theta_prime(tokens, there), tokens.offsets_N1)
            for tokens, _, there in blocks()
        )
        totals = reduce(WeightTotals.plus, of_blocks)
    columns, whole, logs, usable = [], [], None, True
    for tokens, base, there in blocks():
        found, weights = _of_block(tokens, base, there, estimator, totals)
        columns.append(found)
        whole.append(weights.sequence_N)
        usable = usable and importance.log_weights_are_usable(weights)
        of_block = importance.log_totals(weights, tokens.offsets_N1)
        logs = of_block if logs is None else logs.plus(of_block)
    assert logs is not None
    ess_prefix = float(importance.prefix_effective_sample_sizes(logs).min()) if usable else 0.0
    laid_out = (
        tuple(_laid_out(of_node) for of_node in zip(*columns, strict=True))
        if estimator == "path_integral"
        else _laid_out(columns)
    )
    return Measured(laid_out, torch.cat(whole), usable, ess_prefix)


def _of_block(
    tokens: Tokens, base: ReturnsToGo, there: MovedTokens, estimator: importance.Estimator, totals: WeightTotals | None
) -> tuple[Any, PrefixWeights]:
    offsets_N1 = tokens.offsets_N1
    if estimator == "path_integral":
        at_nodes = [
            (importance.prefix_weights(tokens.logprobs_K, node.logprobs_K, offsets_N1), node) for node in there.at_nodes
        ]
        columns = [path_integral.derivative_columns(weights, node, base, offsets_N1) for weights, node in at_nodes]
        return columns, at_nodes[-1][0]
    weights, entropies_K = _at_theta_prime(tokens, there)
    if estimator == "per_decision":
        return importance.per_decision_columns(weights, entropies_K, base, offsets_N1), weights
    if estimator == "weighted_per_decision":
        return importance.weighted_per_decision_columns(weights, entropies_K, offsets_N1, totals), weights
    S_N = ragged.sequence_sum(entropies_K, offsets_N1)
    return MovedColumns(S_N, ragged.lengths(offsets_N1).double()), weights


def _at_theta_prime(tokens: Tokens, there: MovedTokens) -> tuple[PrefixWeights, Tensor]:
    """Weights and h' of a block."""
    assert there.logprobs_K is not None and there.entropies_K is not None
    return importance.prefix_weights(tokens.logprobs_K, there.logprobs_K, tokens.offsets_N1), there.entropies_K


def _laid_out(parts: Iterable[Any]) -> Any:
    """Per-sequence columns of blocks, one after the other."""
    columns = list(parts)
    return type(columns[0])(*map(torch.cat, zip(*columns, strict=True)))


BaseOf = Callable[[int, Tokens], ReturnsToGo]
"""The baselines of the i-th block."""


def _by_position(blocks: Sequence[Callable[[], Tokens]], clusters_N: Tensor | None, baseline: Baseline) -> BaseOf:
    def totals_of(tokens: Tokens) -> BaselineTotals:
        return baselines.baseline_totals(tokens.returns, tokens.offsets_N1, baseline, tokens.dlogprobs_K)

    totals = reduce(BaselineTotals.plus, (totals_of(block()) for block in blocks))
    return lambda _, tokens: baselines.baselines(
        tokens.returns, tokens.offsets_N1, baseline, tokens.dlogprobs_K, totals
    )


def _ridge(blocks: Sequence[Callable[[], Tokens]], clusters_N: Tensor | None, baseline: Baseline) -> BaseOf:
    counts = [len(block().offsets_N1) - 1 for block in blocks]
    folds_N = ridge.folds_of(torch.arange(sum(counts)) if clusters_N is None else clusters_N)
    folds = folds_N.split(counts)

    def block_of(tokens: Tokens, values_K: Tensor, i: int) -> ridge.RidgeBlock:
        features_KF = ridge.prefix_features(tokens.logprobs_K, tokens.entropies_K, tokens.offsets_N1)
        return ridge.RidgeBlock(values_K, features_KF, tokens.dlogprobs_K.double() ** 2, tokens.offsets_N1, folds[i])

    def fits_of(which: int) -> list[ridge.Fit]:
        def read() -> Iterator[ridge.RidgeBlock]:
            for i, block in enumerate(blocks):
                tokens = block()
                yield block_of(tokens, tokens.returns[which], i)

        return ridge.fit(read, int(folds_N.max()) + 1)

    fits = [fits_of(which) for which in range(len(ReturnsToGo._fields))]
    return lambda i, tokens: ReturnsToGo(
        *(
            ridge.ridge_baseline(block_of(tokens, values_K, i), of_values)
            for values_K, of_values in zip(tokens.returns, fits, strict=True)
        )
    )
