"""The second derivative along the step: power series, the explicit formula, and every response of a tiny policy."""

import math

import numpy as np
import pytest
import torch
from conftest import World
from enumeration import Direction, Everything, enumerate_world, per_decision
from test_path_integral import columns_at
from test_uncertainty import both

from entropy_core.numerics import importance, ragged, second_order, uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.second_order import ORDERS, Observation, SecondOrder, combine, of_change, of_slope
from entropy_core.numerics.uncertainty import Estimate

STEPS = [[0.3], [-0.4, 0.4], [0.1, 0.3, 1.0], [0.01, 0.1, 0.3, 1.0, 3.0], [1.0, 1.0]]
SPREAD = 0.2  # of the weights at η = 1
SLOPE = -2.0  # ∂_vH; SLOPE·SPREAD is less than the second order, 0.7, and does not count


def exact(value: float) -> Estimate:
    return Estimate(value, torch.zeros(2, dtype=torch.float64))


def of_series(etas: list[float], a_Q: list[float], rounding: float = 0.0, slopes: bool = False) -> list[Observation]:
    """What a series Σ_q a_q η^q, q from 1, gives at some step sizes."""
    found = []
    for eta in etas:
        change = sum(a * eta**q for q, a in enumerate(a_Q, 1))
        slope = sum(q * a * eta ** (q - 1) for q, a in enumerate(a_Q, 1))
        make, there = (of_slope, slope) if slopes else (of_change, change)
        found.append(make(exact(there), exact(a_Q[0]), eta, SPREAD * eta, rounding))
    return found


@pytest.mark.parametrize("etas", STEPS, ids=str)
@pytest.mark.parametrize("slopes", [False, True])
def test_a_parabola_is_recovered(etas: list[float], slopes: bool):
    found = combine(of_series(etas, [SLOPE, 0.7], slopes=slopes), SLOPE)
    assert found.coefficient.value == pytest.approx(0.7, rel=1e-9)
    assert found.points == len(etas)


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("etas", STEPS[:4], ids=str)
def test_what_is_left_of_the_higher_orders_is_as_large_as_it_says(etas: list[float], slopes: bool):
    """Over series whose terms are what the weights are made for."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(400):
        signs_P = torch.randn(ORDERS, generator=generator, dtype=torch.float64)
        a_Q = [SLOPE, 0.7, *(0.7 * float(s) * SPREAD**p for p, s in enumerate(signs_P, 1))]
        observations = [
            one._replace(coefficient=exact(one.coefficient.value + one.rounding * float(error)))
            for one, error in zip(
                of_series(etas, a_Q, rounding=1e-7, slopes=slopes),
                torch.randn(len(etas), generator=generator),
                strict=True,
            )
        ]
        found = combine(observations, SLOPE)
        ratios.append((found.coefficient.value - 0.7) / found.fixed)
    assert np.sqrt(np.mean(np.square(ratios))) == pytest.approx(1.0, abs=0.15)


def test_more_step_sizes_leave_less_of_them():
    left = [combine(of_series(etas, [SLOPE, 0.7]), SLOPE).truncation for etas in ([1.0], [0.3, 1.0], [0.1, 0.3, 1.0])]
    assert left[0] == pytest.approx(0.7 * SPREAD, rel=0.03)
    assert left[0] > 5 * left[1] > 25 * left[2]
    pair = combine(of_series([-1.0, 1.0], [SLOPE, 0.7, 0.01]), SLOPE)
    assert pair.coefficient.value == pytest.approx(0.7, rel=1e-12)  # opposite steps cancel the third order
    assert pair.truncation == pytest.approx(0.7 * SPREAD**2, rel=0.03)


@pytest.mark.parametrize("rounding", [1e-9, 1e-3])
def test_the_weights_are_the_explicit_formula(rounding: float):
    etas, size = [-0.5, 0.1, 0.3, 2.0], 15.0 * SPREAD  # larger than the observations
    generator = torch.Generator().manual_seed(1)
    changes = [Estimate(0.1 * eta**2, torch.randn(6, generator=generator, dtype=torch.float64)) for eta in etas]
    derivative = Estimate(0.0, torch.randn(6, generator=generator, dtype=torch.float64))
    found = combine(
        [of_change(c, derivative, e, SPREAD * e, rounding) for c, e in zip(changes, etas, strict=True)], 15.0
    )
    eta = np.array(etas)
    Phi = np.stack([(SPREAD * eta) ** p for p in range(1, ORDERS + 1)], axis=1)
    R = np.diag((rounding / eta**2) ** 2)
    inverse = np.linalg.inv(R + size**2 * Phi @ Phi.T)
    weights = inverse.sum(1) / inverse.sum()
    y = np.array([(c.value - e * derivative.value) / e**2 for c, e in zip(changes, etas, strict=True)])
    psi = np.stack([(c.influence_N - e * derivative.influence_N) / e**2 for c, e in zip(changes, etas, strict=True)])
    assert found.coefficient.value == pytest.approx(weights @ y, rel=1e-6)
    np.testing.assert_allclose(found.coefficient.influence_N.numpy(), weights @ psi, rtol=1e-5)
    assert found.rounding == pytest.approx(np.sqrt(weights @ R @ weights), rel=1e-6)
    assert found.truncation == pytest.approx(size * np.linalg.norm(weights @ Phi), rel=1e-5, abs=1e-12)


def test_a_step_that_is_rounding_counts_for_nothing():
    observations = of_series([1e-5, 0.3], [SLOPE, 0.7, 0.05], rounding=1e-6)
    noisy = observations[0]._replace(coefficient=exact(1e4))
    found = combine([noisy, observations[1]], SLOPE)
    assert found.coefficient.value == pytest.approx(0.7, abs=0.02)
    assert found.rounding < 1e-4 * observations[0].rounding
    assert found.fixed == math.hypot(found.rounding, found.truncation)


def test_nothing_moves_and_nothing_is_known():
    still = combine([of_change(exact(0.0), exact(0.0), eta, 0.0, 0.0) for eta in (0.1, 1.0)], 0.0)
    assert still.coefficient.value == still.fixed == 0.0
    with pytest.raises(ValueError, match="needs a step size"):
        combine([], 0.0)


def test_the_spread_of_the_weights():
    w_N = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)
    ess = importance.effective_sample_size(w_N) / 3
    assert second_order.spread(ess, 2.0) == pytest.approx(float(w_N.std(correction=0) / w_N.mean()))
    assert second_order.spread(ess, -2.0) == -second_order.spread(ess, 2.0)
    assert second_order.spread(1.0 + 1e-16, 1.0) == 0.0


# --- every response of a tiny policy ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


NAMES: dict[Normalization, str] = {"per_token": "H_tok", "per_sequence": "H_seq"}


@pytest.fixture(scope="module")
def truth(world: World, v: Direction) -> dict[Normalization, float]:
    """½∂²_vH from exact derivatives at four points, in float64; the error is of the fourth order."""

    def at(eta: float, name: str) -> float:
        values = []
        for sign in (1, -1):
            for parameter, t in v.items():
                world.policy.named_parameters()[parameter].data.add_(t, alpha=sign * eta)
            values.append(world.derivative(lambda e: getattr(e, name), v))
            for parameter, t in v.items():
                world.policy.named_parameters()[parameter].data.sub_(t, alpha=sign * eta)
        return (values[0] - values[1]) / (4 * eta)

    return {of: (4 * at(5e-4, name) - at(1e-3, name)) / 3 for of, name in NAMES.items()}


def sweep(everything: Everything, etas: list[float], normalization: Normalization, slopes: bool) -> SecondOrder:
    """From all sequences of a batch, by changes or by slopes."""
    base, here = everything.base("time_loo"), everything.columns("time_loo")
    derivative = uncertainty.entropy_derivative(here, normalization)
    unmoved = uncertainty.entropy(here[ENTROPY].total_N, here[LENGTH].total_N, normalization)
    found = []
    for eta in etas:
        at_eta = everything.at(eta)
        w_N = at_eta[1].sequence_N
        x = second_order.spread(importance.effective_sample_size(w_N) / len(w_N), eta)
        if slopes:
            there = uncertainty.entropy_derivative(columns_at(everything, eta, base), normalization)
            found.append(of_slope(there, derivative, eta, x, 1e-15))
        else:
            change = uncertainty.entropy(*per_decision(at_eta, base), normalization).minus(unmoved)
            found.append(of_change(change, derivative, eta, x, 1e-15))
    return combine(found, derivative.value)


@both
def test_it_is_the_second_derivative(
    everything: Everything, world: World, v: Direction, truth: dict[Normalization, float], normalization: Normalization
):
    score_N = ragged.sequence_sum(everything.tokens.dlogprobs_K, everything.offsets_N1)
    spread = everything.mean(score_N**2) ** 0.5
    name = NAMES[normalization]
    expected = truth[normalization]
    slope = world.derivative(lambda e: getattr(e, name), v)
    here = getattr(world.exact(), name).item()
    misses = []
    for etas in ([0.2], [0.02, 0.2], [0.02, 0.06, 0.2], [-0.1, -0.02, 0.02, 0.1]):
        observations = []
        for eta in etas:
            change = getattr(world.exact_at(v, eta), name).item() - here
            observations.append(of_change(exact(change), exact(slope), eta, spread * eta, 1e-15))
        found = combine(observations, slope)
        misses.append(abs(found.coefficient.value - expected))
        assert misses[-1] < 4 * found.fixed + 1e-9
    assert misses[0] > 100 * max(misses[1:])
    assert misses[3] < 1e-6


@both
def test_on_a_batch_slopes_and_changes_give_the_same_sequence_by_sequence(
    everything: Everything, normalization: Normalization
):
    batch = everything.drawn(60)
    by_changes = sweep(batch, [-0.1, -0.03, 0.03, 0.1], normalization, slopes=False)
    by_slopes = sweep(batch, [-0.1, -0.03, 0.03, 0.1], normalization, slopes=True)
    assert by_changes.coefficient.value == pytest.approx(by_slopes.coefficient.value, rel=1e-4)
    torch.testing.assert_close(
        by_changes.coefficient.influence_N, by_slopes.coefficient.influence_N, rtol=1e-3, atol=1e-5
    )


def test_its_mean_over_batches_is_exact(everything: Everything, truth: dict[Normalization, float]):
    """Σ_t π(t)·(what t contributes), with fixed baselines: what changes give at a few step sizes, and no sampling."""
    etas = [-0.1, -0.03, 0.03, 0.1]
    base = everything.base("none")
    x = everything.mean(everything.columns("none")[ENTROPY].derivative_N)
    S = everything.mean(everything.columns("none")[ENTROPY].total_N)
    observations = []
    for eta in etas:
        change = everything.mean(per_decision(everything.at(eta), base).S_N) - S
        observations.append(of_change(exact(change), exact(x), eta, SPREAD * eta, 1e-15))
    found = combine(observations, x).coefficient.value
    assert found == pytest.approx(truth["per_sequence"], abs=1e-6)
