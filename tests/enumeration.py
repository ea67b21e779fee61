"""Every response of a world with the package's columns: what an estimator gives on average is then a finite sum."""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import NamedTuple

import torch
from conftest import World
from torch import Tensor

from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.numerics import importance, losses, ragged
from entropy_core.numerics.advantages import group_advantages
from entropy_core.numerics.baselines import baselines
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.first_order import first_order_columns
from entropy_core.numerics.functional import (
    ENTROPY,
    FUNCTIONALS,
    LENGTH,
    Columns,
    Functional,
    TokenPair,
    Tokens,
)
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import PrefixWeights, prefix_weights
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

Direction = dict[str, Tensor]
Bases = dict[Functional, Tensor]


class Everything(NamedTuple):
    """All sequences of a world, their probabilities, and the package's per-token columns along v."""

    world: World
    v: Direction
    sequences: BatchedSequences
    probability_N: Tensor
    tokens: TokenDerivatives
    part_of: "Everything | None" = None
    chosen_N: Tensor | None = None  # which of them

    @property
    def offsets_N1(self) -> Tensor:
        return self.sequences.response_offsets_N1

    def mean(self, values_N: Tensor) -> float:
        return float(self.probability_N @ values_N)

    @property
    def block(self) -> Tokens:
        return as_tokens(self.tokens, self.offsets_N1)

    def columns(self, baseline: Baseline) -> dict[Functional, Columns]:
        return columns_of(self.block, baseline)

    def base(self, baseline: Baseline) -> Bases:
        return {functional: baselines(functional, self.block, baseline) for functional in FUNCTIONALS}

    def at(self, eta: float) -> tuple[Tokens, PrefixWeights]:
        """The sequences at θ + ηv, and the weights from θ to there."""
        if self.part_of is not None and self.chosen_N is not None:
            return taken(*self.part_of.at(eta), self.chosen_N, *self.part_of.tokens_of(self.chosen_N))
        with moves.moved(self.world.policy, self.v, eta):
            moved, _ = processor_of(self.world).score(self.sequences)
        weights = prefix_weights(self.tokens.logprobs_K, moved.logprobs_K, self.offsets_N1)
        return Tokens(moved.logprobs_K, moved.entropies_K, self.offsets_N1), weights

    def drawn(self, count: int, seed: int = 1) -> "Everything":
        """The same of a batch of sequences drawn from the law; their probability is 1/count."""
        generator = torch.Generator().manual_seed(seed)
        return self.subset(torch.multinomial(self.probability_N, count, replacement=True, generator=generator))

    def tokens_of(self, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of some sequences are, one sequence after the other, and their offsets."""
        lengths_N = ragged.lengths(self.offsets_N1)[chosen_N]
        offsets_N1 = ragged.offsets_from_lengths(lengths_N)
        start_K = torch.repeat_interleave(self.offsets_N1[chosen_N], lengths_N)
        return start_K + ragged.position_index(offsets_N1), offsets_N1

    def subset(self, chosen_N: Tensor) -> "Everything":
        old, (pick_K, offsets_N1) = self.sequences, self.tokens_of(chosen_N)
        sequences = BatchedSequences(
            torch.arange(len(chosen_N)),
            old.prompt_ids_N[chosen_N],
            torch.zeros_like(chosen_N),
            torch.cat([old.prompt(i) for i in chosen_N.tolist()]),
            ragged.offsets_from_lengths(ragged.lengths(old.prompt_offsets_N1)[chosen_N]),
            old.response_tokens_K[pick_K],
            offsets_N1,
            ("length",) * len(chosen_N),
        )
        even_N = torch.full((len(chosen_N),), 1 / len(chosen_N), dtype=torch.float64)
        columns = TokenDerivatives(*(column_K[pick_K] for column_K in self.tokens))
        return Everything(self.world, self.v, sequences, even_N, columns, self, chosen_N)


def processor_of(world: World) -> SequenceProcessor:
    return SequenceProcessor(world.policy, GenerationConfig(world.temperature, world.max_new_tokens, tf_batch_size=100))


def enumerate_world(world: World, v: Direction) -> Everything:
    sequences, probability_N = world.everything()
    tokens = processor_of(world).map_tokens(
        sequences, lambda rows: token_derivatives(world.policy, rows, v, world.temperature)
    )
    return Everything(world, v, sequences, probability_N, TokenDerivatives(*tokens))


def as_tokens(derivatives: TokenDerivatives, offsets_N1: Tensor) -> Tokens:
    """Per-token columns with where their sequences begin."""
    return Tokens(*derivatives[:2], offsets_N1, TokenPair(*derivatives[2:]))


def columns_of(tokens: Tokens, baseline: Baseline) -> dict[Functional, Columns]:
    """Of sequences that are all there are."""
    return {f: first_order_columns(f, tokens, baselines(f, tokens, baseline)) for f in FUNCTIONALS}


def taken(
    moved: Tokens, weights: PrefixWeights, chosen_N: Tensor, pick_K: Tensor, offsets_N1: Tensor
) -> tuple[Tokens, PrefixWeights]:
    """Some of the sequences at θ + ηv; `pick_K` and `offsets_N1` are where their tokens are."""
    of_chosen = PrefixWeights(weights.before_K[pick_K], weights.after_K[pick_K], weights.sequence_N[chosen_N])
    return Tokens(moved.logprobs_K[pick_K], moved.entropies_K[pick_K], offsets_N1), of_chosen


class Pair(NamedTuple):
    """Of entropy and length, per sequence [N]."""

    S_N: Tensor
    T_N: Tensor


def per_decision(at_eta: tuple[Tokens, PrefixWeights], bases: Bases) -> Pair:
    """Terms of both by the per-decision estimator."""
    return Pair(*(importance.per_decision_column(f, *at_eta, bases[f]) for f in (ENTROPY, LENGTH)))


def weighted_per_decision(at_eta: tuple[Tokens, PrefixWeights]) -> Pair:
    """The same with weights normalised at each position."""
    return Pair(*(importance.weighted_per_decision_column(f, *at_eta) for f in (ENTROPY, LENGTH)))


def by_position(sequences: Everything) -> Bases:
    """Baselines that know the position only, far from zero: what an independent batch would give."""
    position_K = ragged.position_index(sequences.offsets_N1)
    b_T, c_T = torch.tensor([[1.7, -0.9, 0.4, 2.2], [-3.0, 1.1, 0.8, 5.0]], dtype=torch.float64)
    return {ENTROPY: b_T[position_K], LENGTH: c_T[position_K]}


def no_baseline(sequences: Everything) -> Bases:
    """Zero, for both."""
    return {functional: torch.zeros(len(sequences.tokens.logprobs_K)).double() for functional in FUNCTIONALS}


def evaluation_batch(tokens: TokenDerivatives, offsets_N1: Tensor, baseline: Baseline) -> EvaluationBatch:
    """Columns of independent sequences as the statistics take them."""
    return EvaluationBatch.of([lambda: as_tokens(tokens, offsets_N1)], None, baseline)


def every_batch(everything: Everything, size: int) -> Iterator[tuple[Tensor, float]]:
    """Which sequences are in each batch of this size, and its probability; the order within a batch does not matter."""
    for chosen in combinations_with_replacement(range(len(everything.sequences)), size):
        orders = factorial(size) // prod(factorial(chosen.count(i)) for i in set(chosen))
        yield torch.tensor(chosen), orders * float(everything.probability_N[list(chosen)].prod())


def rloo_coefficients(rewards_PG: Tensor, lengths_N: Tensor) -> Tensor:
    """∂L/∂ℓ under `rloo`, the same for every token of a response: float64 [N]."""
    offsets_N1 = ragged.offsets_from_lengths(lengths_N)
    zero_K = torch.zeros(int(offsets_N1[-1]))
    advantages_PG = group_advantages(rewards_PG, "rloo")
    batch = LossBatch.on_policy(zero_K, zero_K, offsets_N1, advantages_PG, rewards_PG, max_new_tokens=3)
    return losses.coefficients(losses.rloo, batch).logprob_K[offsets_N1[:-1]]


class TokenGradients(NamedTuple):
    """∇ℓ and ∇h of every token over all parameters laid end to end, float64 [K, Q]."""

    logprob_KQ: Tensor
    entropy_KQ: Tensor


def token_gradients(everything: Everything) -> TokenGradients:
    """By one backward pass for each token and each of the two."""
    policy = everything.world.policy
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(len(everything.sequences)):
        one = everything.subset(torch.tensor([i]))
        ((_, batch),) = processor_of(everything.world).micro_batches(one.sequences)
        for unit_K in torch.eye(len(one.tokens.logprobs_K), dtype=torch.float64):
            found = [policy.new_accumulator() for _ in range(2)]
            coefficients = [Coefficients(unit_K, 0 * unit_K), Coefficients(0 * unit_K, unit_K)]
            policy.add_gradients(batch, coefficients, everything.world.temperature, found)
            for column, gradient in zip(rows, found, strict=True):
                column.append(torch.cat([g.flatten() for g in gradient.values()]))
    return TokenGradients(*(torch.stack(column) for column in rows))
