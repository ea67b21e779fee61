"""Reduce the tokens of the evaluation batch E, block by block, to a few numbers per sequence.

Blocks of sequences (shards) are read anew in each pass, but for the first `KEPT_BYTES` of them, so a batch may be as
large as the disk. Estimators that need other sequences use sums at each position, which take an extra pass.

    Kept              blocks that are read once while they are small
    EvaluationBatch   E at the checkpoint's parameters θ
    Moved             E at θ + ηv, with the step v per unit of learning rate and the step size η
    measured          terms of an estimator of the entropy change ΔH, from both

All results are computed for each given functional; see `numerics.functional`. ℓ is the log-probability of a token and h
its entropy, in nats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from entropy_core.numerics import (
    baselines,
    first_order,
    importance,
    path_integral,
    ragged,
    ridge,
    uncertainty,
    weighted_first_order,
)
from entropy_core.numerics.choices import Baseline, Estimator
from entropy_core.numerics.functional import FUNCTIONALS, Columns, Functional, TokenPair, Tokens
from entropy_core.numerics.importance import WeightTotals
from entropy_core.numerics.sampling import Sampling
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.numerics.weights import PrefixWeights, log_weights_are_usable, prefix_weights

Blocks = Sequence[Callable[[], Tokens]]
"""Functions that each load the tokens of one block of sequences."""
Bases = Mapping[Functional, Tensor]
"""The baseline b_k of each functional, [K]."""


KEPT_BYTES = 2**26
"""How much of a batch stays in memory between two passes."""
Block = TypeVar("Block")


class Kept(Generic[Block]):
    """Blocks of tensors, to be iterated over in several passes; the first ones stay in memory, up to `KEPT_BYTES`.

    Args:
        loads: functions that each load one block.
    """

    def __init__(self, loads: Sequence[Callable[[], Block]]) -> None:
        self._loads, self._room = loads, KEPT_BYTES
        self._kept: dict[int, Block] = {}

    def __call__(self) -> Iterator[Block]:
        """Begin a pass."""
        for i, load in enumerate(self._loads):
            if i in self._kept:
                yield self._kept[i]
                continue
            block = load()
            if (size := _bytes(block)) <= self._room and i not in self._kept:
                self._kept[i] = block
                self._room -= size
            yield block


def _bytes(block: Any) -> int:
    """Of all tensors in tuples and dicts."""
    if isinstance(block, Tensor):
        return block.nbytes
    parts = block.values() if isinstance(block, Mapping) else block if isinstance(block, tuple) else ()
    return sum(map(_bytes, parts))


class EvaluationBatch:
    """E at θ, with the grouping of its sequences into independent units.

    Args:
        read: iterates over the blocks, each with its baselines; called once per pass.
        clusters_N: independent unit of each sequence, int64 [N]; None if sequences are independent.
        functionals: the functionals to estimate.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[tuple[Tokens, Bases]]],
        clusters_N: Tensor | None,
        functionals: Sequence[Functional] = FUNCTIONALS,
    ) -> None:
        self.read, self.clusters_N, self.functionals = read, clusters_N, functionals

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        clusters_N: Tensor | None,
        baseline: Baseline,
        functionals: Sequence[Functional] = FUNCTIONALS,
    ) -> "EvaluationBatch":
        """Build E with a baseline of the return-to-go.

        Args:
            blocks: functions that each load the tokens of one block of sequences.
            clusters_N: independent unit of each sequence, int64 [N]; None if sequences are independent.
            baseline: name of the baseline, as in `baselines.baselines`.
            functionals: the functionals to estimate.

        Returns:
            The batch.
        """
        if baseline == "ridge":
            base_of = _ridge(blocks, clusters_N, functionals)
        else:
            base_of = _by_position(blocks, baseline, functionals)

        def load(i: int) -> tuple[Tokens, Bases]:
            tokens = blocks[i]()
            return tokens, {functional: base_of(functional, i, tokens) for functional in functionals}

        return cls(Kept([partial(load, i) for i in range(len(blocks))]), clusters_N, functionals)

    def first(self, sequences: int) -> "EvaluationBatch":
        """Return the first `sequences` of E; their baselines remain those computed on all of E."""

        def read() -> Iterator[tuple[Tokens, Bases]]:
            left = sequences
            for tokens, bases in self.read():
                part = tokens.first(min(left, len(tokens.offsets_N1) - 1))
                yield part, {functional: base_K[: len(part.entropies_K)] for functional, base_K in bases.items()}
                left -= len(part.offsets_N1) - 1
                if not left:
                    return

        clusters_N = None if self.clusters_N is None else self.clusters_N[:sequences]
        return EvaluationBatch(read, clusters_N, self.functionals)

    @cached_property
    def columns(self) -> dict[Functional, Columns]:
        """Per-sequence terms of each functional and of its derivative."""
        return _laid_out(
            {f: first_order.first_order_columns(f, tokens, base_K) for f, base_K in bases.items()}
            for tokens, bases in self.read()
        )

    @cached_property
    def weighted_columns(self) -> dict[Functional, Columns]:
        """Per-sequence terms of the estimator whose weights are normalised at each position."""
        totals = _totals(
            {f: weighted_first_order.weighted_totals(f, t) for f in self.functionals} for t, _ in self.read()
        )
        return _laid_out(
            {f: weighted_first_order.weighted_columns(f, t, totals[f]) for f in self.functionals}
            for t, _ in self.read()
        )

    @cached_property
    def unweighted_columns(self) -> dict[Functional, Columns]:
        """`columns` without the weights of the sampling law: plain totals and local parts of each sequence."""
        if not self.from_proposal:
            return self.columns
        of_blocks = ((tokens._replace(proposal_logprobs_K=None), bases) for tokens, bases in self.read())
        return _laid_out(
            {f: first_order.first_order_columns(f, tokens, base_K) for f, base_K in bases.items()}
            for tokens, bases in of_blocks
        )

    def value_columns(self, estimator: Estimator) -> dict[Functional, Columns]:
        """Return the columns whose totals estimate E[F] at θ in the way that an estimator of ΔH does at θ + ηv."""
        if estimator == "weighted_per_decision":
            return self.weighted_columns
        return self.unweighted_columns if estimator == "snis" else self.columns

    @cached_property
    def score_N(self) -> Tensor:
        """Score Σ_k ℓ̇_k of each sequence, float64 [N]."""
        return torch.cat([ragged.sequence_sum(t.derivative.logprob_K, t.offsets_N1) for t, _ in self.read()])

    @cached_property
    def from_proposal(self) -> bool:
        """Whether another law than the policy drew the sequences."""
        return next(iter(self.read()))[0].proposal_logprobs_K is not None

    @cached_property
    def sampling(self) -> Sampling:
        """Weights from the law that drew the sequences to the policy; all 1 if the policy drew them."""
        return reduce(Sampling.plus, (Sampling.of(tokens) for tokens, _ in self.read()))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).total_N)

    @property
    def units(self) -> int:
        """Number of independent units."""
        return len(self) if self.clusters_N is None else len(self.clusters_N.unique())

    def standard_error(self, estimate: Estimate) -> float:
        """Compute the standard error of an estimate on this batch, with the update held fixed."""
        return uncertainty.standard_error(estimate.influence_N, self.clusters_N)


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
        totals = _totals({f: importance.weight_totals(f, *block) for f in batch.functionals} for block in of_blocks)
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
    laid_out = (
        tuple(_laid_out(of_node) for of_node in zip(*columns, strict=True))
        if estimator == "path_integral"
        else _laid_out(columns)
    )
    return Measured(laid_out, torch.cat(whole), usable, ess_prefix)


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


def _laid_out(parts: Iterable[dict[Functional, Any]]) -> dict[Functional, Any]:
    """Concatenate the per-sequence columns of all blocks, for each functional."""
    blocks = list(parts)

    def joined(columns: list[Any]) -> Any:
        if isinstance(columns[0], Tensor):
            return torch.cat(columns)
        return type(columns[0])(*map(torch.cat, zip(*columns, strict=True)))

    return {functional: joined([block[functional] for block in blocks]) for functional in blocks[0]}


def _totals(of_blocks: Iterable[dict[Functional, Any]]) -> dict[Functional, Any]:
    """Add the totals of all blocks, for each functional."""
    return reduce(lambda a, b: {functional: total.plus(b[functional]) for functional, total in a.items()}, of_blocks)


BaseOf = Callable[[Functional, int, Tokens], Tensor]
"""Returns the baseline of a functional in the i-th block."""


def _by_position(blocks: Blocks, baseline: Baseline, functionals: Sequence[Functional]) -> BaseOf:
    def totals_of(tokens: Tokens) -> dict[Functional, baselines.TimeTotals]:
        return {f: baselines.baseline_totals(f, tokens, baseline) for f in functionals}

    totals = _totals(totals_of(block()) for block in blocks)
    return lambda functional, _, tokens: baselines.baselines(functional, tokens, baseline, totals[functional])


def _ridge(blocks: Blocks, clusters_N: Tensor | None, functionals: Sequence[Functional]) -> BaseOf:
    counts = [len(block().offsets_N1) - 1 for block in blocks]
    folds_N = ridge.folds_of(torch.arange(sum(counts)) if clusters_N is None else clusters_N)
    folds = folds_N.split(counts)

    def block_of(functional: Functional, i: int, tokens: Tokens) -> ridge.RidgeBlock:
        returns_K = baselines.returns_to_go(functional, tokens)
        features_KF = ridge.prefix_features(tokens.logprobs_K, tokens.entropies_K, tokens.offsets_N1)
        return ridge.RidgeBlock(returns_K, features_KF, baselines.score_weights(tokens), tokens.offsets_N1, folds[i])

    def fits_of(functional: Functional) -> list[ridge.Fit]:
        def read() -> Iterator[ridge.RidgeBlock]:
            for i, block in enumerate(blocks):
                yield block_of(functional, i, block())

        return ridge.fit(read, int(folds_N.max()) + 1)

    fits = {functional: fits_of(functional) for functional in functionals}
    return lambda functional, i, tokens: ridge.ridge_baseline(block_of(functional, i, tokens), fits[functional])
