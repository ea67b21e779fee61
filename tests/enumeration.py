"""Every response of a world with the package's columns: what an estimator gives on average is then a finite sum."""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import NamedTuple

import torch
from conftest import World
from torch import Tensor

from entropy_core.batched_sequences import BatchedSequences
from entropy_core.evaluation import EvaluationBatch, Tokens
from entropy_core.numerics import importance, losses, ragged
from entropy_core.numerics.advantages import group_advantages
from entropy_core.numerics.baselines import Baseline, ReturnsToGo, baselines, returns_to_go
from entropy_core.numerics.first_order import FirstOrderColumns, first_order_columns
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.policy import Coefficients
from entropy_core.sequence_processor import GenerationConfig, SequenceProcessor

Direction = dict[str, Tensor]


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

    def columns(self, baseline: Baseline) -> FirstOrderColumns:
        return first_order_columns(*self.tokens[1:], self.offsets_N1, baseline)

    def base(self, baseline: Baseline) -> ReturnsToGo:
        returns = returns_to_go(self.tokens.entropies_K, self.offsets_N1)
        return baselines(returns, self.offsets_N1, baseline, self.tokens.dlogprobs_K)

    def at(self, eta: float) -> tuple[importance.PrefixWeights, Tensor]:
        """Weights and h' at θ + ηv."""
        if self.part_of is not None and self.chosen_N is not None:
            weights, moved_K = self.part_of.at(eta)
            pick_K, _ = self.part_of.tokens_of(self.chosen_N)
            before_K, after_K = weights.before_K[pick_K], weights.after_K[pick_K]
            return importance.PrefixWeights(before_K, after_K, weights.sequence_N[self.chosen_N]), moved_K[pick_K]
        with self.world.policy.moved(self.v, eta):
            moved, _ = processor_of(self.world).score(self.sequences)
        return importance.prefix_weights(self.tokens.logprobs_K, moved.logprobs_K, self.offsets_N1), moved.entropies_K

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
        sequences, lambda rows: world.policy.derivatives(rows, v, world.temperature)
    )
    return Everything(world, v, sequences, probability_N, TokenDerivatives(*tokens))


def by_position(sequences: Everything) -> ReturnsToGo:
    """Baselines that know the position only, far from zero: what an independent batch would give."""
    position_K = ragged.position_index(sequences.offsets_N1)
    b_T, c_T = torch.tensor([[1.7, -0.9, 0.4, 2.2], [-3.0, 1.1, 0.8, 5.0]], dtype=torch.float64)
    return ReturnsToGo(b_T[position_K], c_T[position_K])


def evaluation_batch(tokens: TokenDerivatives, offsets_N1: Tensor, baseline: Baseline) -> EvaluationBatch:
    """Columns of independent sequences as the statistics take them."""
    return EvaluationBatch.of([lambda: Tokens(*tokens, offsets_N1)], None, baseline)


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
    batch = losses.LossBatch.on_policy(zero_K, zero_K, offsets_N1, advantages_PG, rewards_PG, max_new_tokens=3)
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
