"""Functionals that the package does not have, through its formulas, against every response of a tiny policy.

    ENDS        1 for an EOS token: known with the token, the same whatever the policy
    COST        a price for each token, times its surprisal, plus the square of the step's entropy
    SURPRISAL   −ℓ: its mean is the entropy of a response, by another estimator

What they are on average, exactly, is a sum over all responses, differentiated in reverse mode.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import get_args

import pytest
import torch
from conftest import World, gpt2, policy_of, random_direction
from enumeration import (
    Direction,
    Everything,
    as_tokens,
    by_position,
    enumerate_world,
    every_batch,
    no_baseline,
    processor_of,
)
from torch import Tensor

from entropy_core.estimates import measurement
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens
from entropy_core.numerics import first_order, importance, path_integral, ragged, uncertainty, weighted_first_order
from entropy_core.numerics.baselines import baselines
from entropy_core.numerics.choices import Baseline, Estimator
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, LENGTH, Functional, TokenPair, Tokens
from entropy_core.numerics.quadrature import NODES
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import PrefixWeights, prefix_weights
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients

EXACT = 1e-10
PRICES = torch.tensor([0.3, -1.1, 0.7, 2.0], dtype=torch.float64)
Value = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the tokens, their ℓ and their h

EOS = 2
VALUES: dict[str, Value] = {
    "ends": lambda tokens_K, logprobs_K, entropies_K: (tokens_K == EOS).double(),
    "cost": lambda tokens_K, logprobs_K, entropies_K: -PRICES[tokens_K] * logprobs_K + entropies_K**2,
    "surprisal": lambda tokens_K, logprobs_K, entropies_K: -logprobs_K,
}
each = pytest.mark.parametrize("name", VALUES)


def third(name: str, everything: Everything) -> Functional:
    """What a file of its own would define."""
    tokens_K, value = everything.sequences.response_tokens_K, VALUES[name]
    return Functional(name, lambda t: value(tokens_K, t.logprobs_K, t.entropies_K), of_action=True)


def exact(world: World, name: str) -> Tensor:
    """E[Σ_k f_k], differentiable in the parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt in world.prompts:
        responses, logp = world.responses(prompt)
        for response, log_probability in zip(responses, logp, strict=True):
            logits = world.policy.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp_KV, tokens_K = torch.log_softmax(logits / world.temperature, -1), torch.tensor(response)
            own_K = logp_KV.gather(1, tokens_K[:, None])[:, 0]
            terms_K = VALUES[name](tokens_K, own_K, -(logp_KV.exp() * logp_KV).sum(-1))
            total = total + log_probability.exp() * terms_K.sum() / len(world.prompts)
    return total


def exactly(world: World, v: Direction, name: str) -> tuple[float, float]:
    """The value at the policy as it is now, and its derivative along v."""
    value, parameters = exact(world, name), world.policy.named_parameters()
    gradients = torch.autograd.grad(value, [parameters[of] for of in v])
    return value.item(), sum(float((g * t).sum()) for g, t in zip(gradients, v.values(), strict=True))


@pytest.fixture(scope="module")
def everything() -> Everything:
    world = World(policy_of(gpt2(eos_token_id=EOS)), [[1], [2, 0]], temperature=0.7, max_new_tokens=3)
    assert world.policy.eos_token_ids == (EOS,)
    return enumerate_world(world, random_direction(world.policy))


@pytest.fixture(scope="module")
def few() -> Everything:
    """Two prompts and 14 sequences, so that every batch of three can be gone through."""
    world = World(policy_of(gpt2(vocabulary=3, eos_token_id=EOS)), [[1], [0, 2, 1]], temperature=0.8, max_new_tokens=2)
    return enumerate_world(world, random_direction(world.policy))


# --- exact on average ------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("with_baseline", [False, True])
def test_value_and_derivative_are_exact_on_average(everything: Everything, name: str, with_baseline: bool):
    functional = third(name, everything)
    bases = by_position(everything) if with_baseline else no_baseline(everything)
    columns = first_order.first_order_columns(functional, everything.block, bases[ENTROPY])
    value, slope = exactly(everything.world, everything.v, name)
    assert everything.mean(columns.total_N) == pytest.approx(value, abs=EXACT)
    assert everything.mean(columns.derivative_N) == pytest.approx(slope, abs=EXACT)
    future = slope - everything.mean(columns.local_N)
    assert abs(slope) > 1e-3 and abs(future) > 1e-3
    if name == "ends":
        assert not columns.local_N.any()
    if name == "surprisal":  # two estimators of one thing, and not the same one
        of_entropy = everything.columns("none")[ENTROPY]
        assert everything.mean(of_entropy.derivative_N) == pytest.approx(slope, abs=EXACT)
        assert (of_entropy.derivative_N - columns.derivative_N).abs().max() > 0.1


@each
@pytest.mark.parametrize("eta", [-0.5, 0.3, 2.0])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_moved_value_is_exact_on_average(everything: Everything, name: str, eta: float, with_baseline: bool):
    functional, world, v = third(name, everything), everything.world, everything.v
    bases = by_position(everything) if with_baseline else no_baseline(everything)
    terms_N = importance.per_decision_column(functional, *everything.at(eta), bases[LENGTH])
    with moves.moved(world.policy, v, eta):
        value, slope = exactly(world, v, name)
        derivatives = processor_of(world).map_tokens(
            everything.sequences, lambda rows: token_derivatives(world.policy, rows, v, world.temperature)
        )
    assert everything.mean(terms_N) == pytest.approx(value, abs=EXACT)
    assert abs(value - exactly(world, v, name)[0]) > 1e-4
    # and so is the derivative there, of which the path integral is made
    there = as_tokens(TokenDerivatives(*derivatives), everything.offsets_N1)
    weights = prefix_weights(everything.tokens.logprobs_K, there.logprobs_K, everything.offsets_N1)
    columns = path_integral.derivative_columns(functional, there, weights, bases[LENGTH])
    assert everything.mean(columns.derivative_N) == pytest.approx(slope, abs=EXACT)
    assert everything.mean(columns.total_N) == pytest.approx(value, abs=EXACT)


@each
@pytest.mark.parametrize("baseline", [b for b in get_args(Baseline) if b != "none"])
def test_every_baseline_leaves_the_mean(few: Everything, name: str, baseline: Baseline):
    """Over every batch of three, by the way that a sweep goes."""
    total = 0.0
    for chosen_N, probability in every_batch(few, 3):
        part = few.subset(chosen_N)
        functional, tokens = third(name, part), part.block
        batch = EvaluationBatch.of([lambda tokens=tokens: tokens], None, baseline, (functional,))
        total += probability * float(batch.columns[functional].derivative_N.mean())
    assert total == pytest.approx(exactly(few.world, few.v, name)[1], abs=EXACT)


@each
def test_backward_mode_gives_the_gradient(everything: Everything, name: str):
    """By the coefficients that the entropy-gradient stage takes: R_k − b_k and the slopes of f_k."""
    functional, world = third(name, everything), everything.world
    slopes = functional.slopes(everything.block)
    score_K = first_order.score_coefficients(functional, everything.block, "none")
    probability_K = torch.repeat_interleave(everything.probability_N, everything.sequences.lengths_N)
    weights = probability_K * (score_K + slopes.logprob_K), probability_K * slopes.entropy_K
    found = world.policy.new_accumulator()
    for index_K, rows in processor_of(world).micro_batches(everything.sequences):
        of_rows = Coefficients(*(values_K[index_K] for values_K in weights))
        world.policy.add_gradients(rows, [of_rows], world.temperature, [found])
    parameters = world.policy.named_parameters()
    expected = torch.autograd.grad(exact(world, name), list(parameters.values()))
    for of, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[of], g, rtol=0, atol=EXACT)


# --- weights normalised by position ----------------------------------------------------------------------------------


def weighted_by_hand(batch: Everything, moved: Tokens, weights: PrefixWeights, name: str) -> float:
    """Σ_k A_k/W_k by loops; a token's own ratio is in its weight, and a finished sequence keeps its weight."""
    values = third(name, batch).values(moved).tolist()
    _, after, whole = (w.tolist() for w in weights)
    total = 0.0
    for k in range(3):
        alive = [first + k for first, stop in pairwise(batch.offsets_N1.tolist()) if first + k < stop]
        spans = zip(whole, pairwise(batch.offsets_N1.tolist()), strict=True)
        finished = [w for w, (first, stop) in spans if first + k >= stop]
        total += sum(after[j] * values[j] for j in alive) / (sum(after[j] for j in alive) + sum(finished))
    return total


@each
def test_the_weighted_estimator_and_its_derivative(everything: Everything, name: str):
    batch, step = everything.drawn(60), 1e-5
    functional = third(name, batch)
    moved, weights = batch.at(0.7)
    found_N = importance.weighted_per_decision_column(functional, moved, weights)
    assert float(found_N.mean()) == pytest.approx(weighted_by_hand(batch, moved, weights, name), rel=1e-12)
    above, below = (importance.weighted_per_decision_column(functional, *batch.at(eta)) for eta in (step, -step))
    columns = weighted_first_order.weighted_columns(functional, batch.block)
    rise, slope = uncertainty.mean((above - below) / (2 * step)), uncertainty.mean(columns.derivative_N)
    assert rise.value == pytest.approx(slope.value, rel=1e-6)
    torch.testing.assert_close(rise.influence_N, slope.influence_N, rtol=1e-5, atol=1e-7)


@each
def test_per_decision_grows_as_first_order_says_sequence_by_sequence(everything: Everything, name: str):
    batch, step = everything.drawn(60), 1e-5
    functional = third(name, batch)
    base_K = baselines(functional, batch.block, "time_loo")
    above, below = (importance.per_decision_column(functional, *batch.at(eta), base_K) for eta in (step, -step))
    columns = first_order.first_order_columns(functional, batch.block, base_K)
    torch.testing.assert_close((above - below) / (2 * step), columns.derivative_N, rtol=1e-6, atol=1e-8)


# --- by the way that a sweep goes ------------------------------------------------------------------------------------

SURPRISAL = Functional("surprisal", lambda tokens: -tokens.logprobs_K, of_action=True)
ALL = (*FUNCTIONALS, SURPRISAL)


def cut(batch: Everything, ends: list[int]) -> Iterator[Everything]:
    for start, stop in pairwise(ends):
        yield batch.subset(torch.arange(start, stop))


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_a_third_one_beside_the_others_block_by_block(everything: Everything, estimator: Estimator):
    """Of several blocks as of one, whatever the estimator; and the entropy and the length are what they are alone."""
    batch, eta = everything.drawn(12), 0.4
    nodes = [nodes_of(batch, eta, part) for part in (batch, *cut(batch, [0, 1, 5, 12]))]

    def measured(parts: list[Everything], of: list[MovedTokens], functionals: tuple[Functional, ...]) -> tuple:
        blocks = [lambda tokens=part.block: tokens for part in parts]
        whole = EvaluationBatch.of(blocks, None, "time_loo", functionals)
        return whole, measurement.measured(whole, Moved(eta, lambda: of), estimator)

    one, there_one = measured([batch], nodes[:1], ALL)
    several, there_several = measured(list(cut(batch, [0, 1, 5, 12])), nodes[1:], ALL)
    alone, there_alone = measured([batch], nodes[:1], FUNCTIONALS)
    for functional in ALL:
        for found_N, expected_N in zip(several.columns[functional], one.columns[functional], strict=True):
            torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-13)
        for found_N, expected_N in zip(
            several.weighted_columns[functional], one.weighted_columns[functional], strict=True
        ):
            torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-13)
        for found_N, expected_N in zip(terms(there_several, functional), terms(there_one, functional), strict=True):
            torch.testing.assert_close(found_N, expected_N, rtol=1e-11, atol=1e-12)
    for functional in FUNCTIONALS:
        assert all(map(torch.equal, alone.columns[functional], one.columns[functional]))
        assert all(map(torch.equal, terms(there_alone, functional), terms(there_one, functional)))
    assert len(one.columns) == 3 and len(alone.columns) == 2


def nodes_of(batch: Everything, eta: float, part: Everything) -> MovedTokens:
    """What the stages importance and path-integral leave."""
    world, v = batch.world, batch.v

    def at(step: float) -> TokenDerivatives:
        with moves.moved(world.policy, v, step):
            return TokenDerivatives(
                *processor_of(world).map_tokens(
                    part.sequences, lambda rows: token_derivatives(world.policy, rows, v, world.temperature)
                )
            )

    moved = at(eta)
    return MovedTokens(moved.logprobs_K, moved.entropies_K, tuple(at(s * eta) for s in NODES))


def terms(there: measurement.Measured, functional: Functional) -> list[Tensor]:
    if isinstance(there.columns, tuple):
        return [column_N for node in there.columns for column_N in node[functional]]
    assert there.columns is not None
    return [there.columns[functional]]


# --- the record ------------------------------------------------------------------------------------------------------


def test_entropy_and_length_are_what_they_say(everything: Everything):
    tokens = everything.block
    assert [functional.name for functional in FUNCTIONALS] == ["entropy", "length"]
    assert torch.equal(ENTROPY.values(tokens), everything.tokens.entropies_K)
    assert torch.equal(ENTROPY.derivative(tokens), everything.tokens.dentropies_K)
    assert (LENGTH.values(tokens) == 1).all() and not LENGTH.derivative(tokens).any()
    narrow = Tokens(tokens.logprobs_K.float(), tokens.entropies_K.float(), tokens.offsets_N1, tokens.along)
    for functional in ALL:
        assert functional.values(narrow).dtype == functional.derivative(narrow).dtype == torch.float64


def test_the_derivative_follows_by_the_chain_rule():
    logprobs_K, entropies_K = -torch.rand(2, 9, dtype=torch.float64) - 0.1
    along = TokenPair(*torch.randn(2, 9, dtype=torch.float64))
    tokens = Tokens(logprobs_K, entropies_K, torch.tensor([0, 4, 9]), along)
    bent = Functional("bent", lambda t: t.logprobs_K**2 * t.entropies_K.exp())
    expected_K = entropies_K.exp() * (2 * logprobs_K * along.logprob_K + logprobs_K**2 * along.entropy_K)
    torch.testing.assert_close(bent.derivative(tokens), expected_K, rtol=1e-13, atol=0)


def test_what_needs_a_direction_says_so():
    tokens = Tokens(torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]))
    assert ragged.sequence_sum(LENGTH.values(tokens), tokens.offsets_N1).tolist() == [3.0]
    with pytest.raises(ValueError, match="needs the derivatives"):
        ENTROPY.derivative(tokens)
