"""The integral along the step, against every response of a tiny policy; and where a difference is only rounding."""

import copy

import pytest
import torch
from conftest import World, gpt2, policy_of
from enumeration import (
    Bases,
    Direction,
    Everything,
    as_tokens,
    by_position,
    enumerate_world,
    no_baseline,
    per_decision,
    processor_of,
)

from entropy_core.numerics import path_integral, uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns, Functional
from entropy_core.numerics.quadrature import NODES, WEIGHTS
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import prefix_weights
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives

EXACT = 1e-10
both = pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


def columns_at(everything: Everything, eta: float, base: Bases) -> dict[Functional, Columns]:
    """Of ∂_vH at θ + ηv, from the sequences and their probabilities at θ."""
    policy, offsets_N1 = everything.world.policy, everything.offsets_N1
    with moves.moved(policy, everything.v, eta):
        moved = TokenDerivatives(
            *processor_of(everything.world).map_tokens(
                everything.sequences,
                lambda rows: token_derivatives(policy, rows, everything.v, everything.world.temperature),
            )
        )
    weights = prefix_weights(everything.tokens.logprobs_K, moved.logprobs_K, offsets_N1)
    there = as_tokens(moved, offsets_N1)
    return {f: path_integral.derivative_columns(f, there, weights, base_K) for f, base_K in base.items()}


def change(everything: Everything, eta: float, base: Bases, normalization: Normalization) -> uncertainty.Estimate:
    at_nodes = [columns_at(everything, node * eta, base) for node in NODES]
    return path_integral.entropy_change(at_nodes, eta, normalization)


def test_at_theta_the_terms_are_those_of_first_order(everything: Everything):
    base = everything.base("time_loo")
    found, expected = columns_at(everything, 0.0, base), everything.columns("time_loo")
    for functional in (ENTROPY, LENGTH):
        for found_N, expected_N in zip(found[functional], expected[functional], strict=True):
            torch.testing.assert_close(found_N, expected_N, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eta", [-0.5, 0.3, 2.0])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_derivative_further_on_is_exact_on_average(everything: Everything, eta: float, with_baseline: bool):
    base = by_position(everything) if with_baseline else no_baseline(everything)
    columns, world, v = columns_at(everything, eta, base), everything.world, everything.v
    with moves.moved(world.policy, v, eta):
        slopes = [world.derivative(lambda e: e.H_seq, v), world.derivative(lambda e: e.L, v)]
        values = [world.exact().H_seq.item(), world.exact().L.item()]
    assert everything.mean(columns[ENTROPY].derivative_N) == pytest.approx(slopes[0], abs=EXACT)
    assert everything.mean(columns[LENGTH].derivative_N) == pytest.approx(slopes[1], abs=EXACT)
    assert everything.mean(columns[ENTROPY].total_N) == pytest.approx(values[0], abs=EXACT)
    assert everything.mean(columns[LENGTH].total_N) == pytest.approx(values[1], abs=EXACT)


@both
def test_it_is_the_per_decision_change_of_a_batch(everything: Everything, normalization: Normalization):
    """Not on average only: on any batch, the influences included."""
    batch, eta = everything.drawn(60), 0.05
    base = batch.base("time_loo")
    found = change(batch, eta, base, normalization)
    there = per_decision(batch.at(eta), base)
    here = batch.columns("time_loo")
    unmoved = uncertainty.entropy(here[ENTROPY].total_N, here[LENGTH].total_N, normalization)
    expected = uncertainty.entropy(*there, normalization).minus(unmoved)
    assert found.value == pytest.approx(expected.value, rel=1e-8)
    torch.testing.assert_close(found.influence_N, expected.influence_N, rtol=1e-6, atol=1e-9)


@both
def test_the_quadrature_leaves_an_error_of_high_order(everything: Everything, normalization: Normalization):
    batch, misses = everything.drawn(60), []
    base, here = batch.base("time_loo"), batch.columns("time_loo")
    for eta in (0.8, 0.4):
        there = per_decision(batch.at(eta), base)
        expected = uncertainty.entropy(*there, normalization).value
        expected -= uncertainty.entropy(here[ENTROPY].total_N, here[LENGTH].total_N, normalization).value
        misses.append(abs(change(batch, eta, base, normalization).value - expected))
    assert misses[1] < misses[0] / 2**5  # three nodes: the seventh order, and rounding
    assert misses[0] < 1e-4


def test_weights_and_nodes_integrate_polynomials_of_degree_five():
    for degree in range(6):
        found = sum(w * s**degree for s, w in zip(NODES, WEIGHTS, strict=True))
        assert found == pytest.approx(1 / (degree + 1), rel=1e-14)


def test_in_float32_it_stays_exact_where_a_difference_is_rounding(world: World, v: Direction):
    eta = 1e-9
    exact = eta * world.derivative(lambda e: e.H_seq, v)  # the second order is 1e-9 of it
    narrow = World(policy_of(copy.deepcopy(world.policy.model).float()), *world[1:])
    everything = enumerate_world(narrow, {name: t.float() for name, t in v.items()})
    everything = everything._replace(probability_N=enumerate_world(world, v).probability_N)
    base = no_baseline(everything)
    at_nodes = [columns_at(everything, node * eta, base) for node in NODES]
    x = [everything.mean(columns[ENTROPY].derivative_N) for columns in at_nodes]
    found = eta * sum(w * x_j for w, x_j in zip(WEIGHTS, x, strict=True))
    assert found == pytest.approx(exact, rel=1e-5)
    there = per_decision(everything.at(eta), base)
    difference = everything.mean(there.S_N) - everything.mean(everything.columns("none")[ENTROPY].total_N)
    assert abs(difference / exact - 1) > 0.1


def test_the_tiny_policy_of_another_shape_too():
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2, 1]], temperature=0.8, max_new_tokens=2)
    v = {name: torch.ones_like(p).detach() / p.numel() for name, p in world.policy.named_parameters().items()}
    everything = enumerate_world(world, v)
    base, eta = no_baseline(everything), 0.1
    at_nodes = [columns_at(everything, node * eta, base) for node in NODES]
    H_seq = sum(
        eta * w * everything.mean(columns[ENTROPY].derivative_N) for w, columns in zip(WEIGHTS, at_nodes, strict=True)
    )
    exact = world.exact_at(v, eta).H_seq.item() - world.exact().H_seq.item()
    assert H_seq == pytest.approx(exact, abs=1e-11)
