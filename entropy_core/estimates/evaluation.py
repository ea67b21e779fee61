"""The evaluation batch E at the checkpoint's parameters θ: its tokens reduced, block by block, to numbers per sequence.

Blocks of sequences (shards) are read anew in each pass, but for the first `KEPT_BYTES` of them, so a batch may be as
large as the disk. Estimators that need other sequences use sums at each position, which take an extra pass.

All results are computed for each given functional; see `numerics.functional`. ℓ is the log-probability of a token and h
its entropy, in nats. E at θ + ηv is in `measurement`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce

import torch
from torch import Tensor

from entropy_core.estimates.blocks import Kept, added, laid_out
from entropy_core.numerics import baselines, first_order, ragged, ridge, uncertainty, weighted_first_order
from entropy_core.numerics.choices import Baseline, Estimator
from entropy_core.numerics.functional import FUNCTIONALS, Columns, Functional, Tokens
from entropy_core.numerics.sampling import Sampling
from entropy_core.numerics.uncertainty import Estimate

Blocks = Sequence[Callable[[], Tokens]]
"""Functions that each load the tokens of one block of sequences."""
Bases = Mapping[Functional, Tensor]
"""The baseline b_k of each functional, [K]."""


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
        return laid_out(
            {f: first_order.first_order_columns(f, tokens, base_K) for f, base_K in bases.items()}
            for tokens, bases in self.read()
        )

    @cached_property
    def weighted_columns(self) -> dict[Functional, Columns]:
        """Per-sequence terms of the estimator whose weights are normalised at each position."""
        totals = added(
            {f: weighted_first_order.weighted_totals(f, t) for f in self.functionals} for t, _ in self.read()
        )
        return laid_out(
            {f: weighted_first_order.weighted_columns(f, t, totals[f]) for f in self.functionals}
            for t, _ in self.read()
        )

    @cached_property
    def unweighted_columns(self) -> dict[Functional, Columns]:
        """`columns` without the weights of the sampling law: plain totals and local parts of each sequence."""
        if not self.from_proposal:
            return self.columns
        of_blocks = ((tokens._replace(proposal_logprobs_K=None), bases) for tokens, bases in self.read())
        return laid_out(
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


BaseOf = Callable[[Functional, int, Tokens], Tensor]
"""Returns the baseline of a functional in the i-th block."""


def _by_position(blocks: Blocks, baseline: Baseline, functionals: Sequence[Functional]) -> BaseOf:
    def totals_of(tokens: Tokens) -> dict[Functional, baselines.TimeTotals]:
        return {f: baselines.baseline_totals(f, tokens, baseline) for f in functionals}

    totals = added(totals_of(block()) for block in blocks)
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
