"""The fit of ΔH/η and the pairs of opposite steps: polynomials, the explicit formula, simulation, enumeration."""

import math

import numpy as np
import pytest
import torch
from conftest import World
from enumeration import Everything, enumerate_world, per_decision
from test_uncertainty import both
from torch import Tensor

from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.linearity import LACK_OF_FIT, LinearityFit, fit, pairs
from entropy_core.numerics.uncertainty import Estimate, standard_error

SEVERAL = [[0.1, 0.3], [-0.2, 0.1, 0.3], [0.01, 0.1, 0.3, 1.0], [-0.5, -0.1, 0.1, 0.5, 2.0]]


def polynomial(etas: list[float], coefficients: list[Estimate]) -> list[Estimate]:
    """Σ_p c_p η^{p+1}: a ΔH whose coefficients are estimates on one batch."""
    return [
        Estimate(
            sum(c.value * eta ** (p + 1) for p, c in enumerate(coefficients)),
            sum(c.influence_N * eta ** (p + 1) for p, c in enumerate(coefficients)),
        )
        for eta in etas
    ]


def made_up(N: int = 50, count: int = 3, seed: int = 0) -> list[Estimate]:
    """Coefficients whose influences are correlated, of falling size."""
    generator = torch.Generator().manual_seed(seed)
    raw_NP = torch.randn(N, count, generator=generator, dtype=torch.float64)
    mixed_NP = raw_NP @ torch.tensor([[5.0, 1.0, 0.3], [0.0, 1.0, 0.4], [0.0, 0.0, 0.3]]).double()[:count, :count]
    centred_NP = mixed_NP - mixed_NP.mean(0)
    return [Estimate(value, centred_NP[:, p]) for p, value in enumerate([-2.0, 0.7, 0.4][:count])]


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("etas", SEVERAL, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_polynomial_is_recovered(etas: list[float], noise: float):
    coefficients = made_up(count=3 if len(etas) >= 4 else 2)
    found = fit(etas, polynomial(etas, coefficients), [noise] * len(etas), coefficients[0])
    for estimate, expected in zip(found, coefficients[:2], strict=False):
        assert estimate.value == pytest.approx(expected.value, rel=1e-11)
        torch.testing.assert_close(estimate.influence_N, expected.influence_N, rtol=1e-10, atol=1e-11)
    assert found.difference.value == pytest.approx(0.0, abs=1e-11)
    assert found.difference.influence_N.abs().max() < 1e-10
    assert found.points == len(etas)
    assert (found.intercept_noise > 0) == (found.curvature_noise > 0) == (noise > 0)


@pytest.mark.parametrize("etas", SEVERAL, ids=str)
@pytest.mark.parametrize("clustered", [False, True])
def test_the_fit_is_the_explicit_formula(etas: list[float], clustered: bool):
    J, N = len(etas), 40
    clusters_N = torch.randint(0, 12, (N,)) * 5 if clustered else None
    influence_NJ = torch.randn(N, J).double() + 2 * torch.randn(N, 1).double()
    influence_NJ = influence_NJ - influence_NJ.mean(0)
    values_J, noise_J = torch.randn(J).double(), 0.1 + torch.rand(J).double()
    changes = [Estimate(float(values_J[j]), influence_NJ[:, j]) for j in range(J)]
    derivative = Estimate(0.3, influence_NJ[:, 0] + torch.linspace(-1, 1, N).double())
    found = fit(etas, changes, noise_J.tolist(), derivative, clusters_N)

    eta = np.array(etas)
    covariance = np.empty((J, J))
    slopes = [(change.scaled(1 / e).minus(derivative)).influence_N for change, e in zip(changes, etas, strict=True)]
    for j in range(J):
        for k in range(J):  # a covariance from the variance of a sum, in the convention of the standard error
            of_sum = standard_error(slopes[j] + slopes[k], clusters_N) ** 2
            of_difference = standard_error(slopes[j] - slopes[k], clusters_N) ** 2
            covariance[j, k] = (of_sum - of_difference) / 4
    noise = np.diag((noise_J.numpy() / (2 * eta)) ** 2)
    covariance += noise
    covariance += LACK_OF_FIT * np.diag(np.diag(covariance))
    X = np.stack([eta**p for p in range(3 if J >= 4 else 2)], axis=1)
    inverse = np.linalg.inv(covariance)
    weights = np.linalg.inv(X.T @ inverse @ X) @ X.T @ inverse
    beta = weights @ (values_J.numpy() / eta)
    assert (found.intercept.value, found.curvature.value) == pytest.approx(tuple(beta[:2]), rel=1e-9)
    expected_NP = (influence_NJ.numpy() / eta) @ weights.T
    np.testing.assert_allclose(found.intercept.influence_N.numpy(), expected_NP[:, 0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.curvature.influence_N.numpy(), expected_NP[:, 1], rtol=1e-8, atol=1e-9)
    of_noise = np.sqrt(np.diag(weights @ noise @ weights.T))
    assert (found.intercept_noise, found.curvature_noise) == pytest.approx(tuple(of_noise[:2]), rel=1e-9)
    assert found.difference.value == pytest.approx(beta[0] - 0.3, rel=1e-9)


def test_a_step_size_of_zero_is_left_out():
    coefficients, etas = made_up(), [0.0, 0.1, 0.2, 0.4]
    changes = polynomial(etas, coefficients)
    with_zero = fit(etas, changes, [1e-3] * 4, coefficients[0])
    without = fit(etas[1:], changes[1:], [1e-3] * 3, coefficients[0])
    assert with_zero.points == without.points == 3
    assert with_zero.curvature.value == without.curvature.value


@pytest.mark.parametrize("etas", [[], [0.1], [0.0, 0.1], [0.1, 0.1], [0.0, 0.0]], ids=str)
def test_one_step_size_makes_no_line(etas: list[float]):
    coefficients = made_up()
    with pytest.raises(ValueError, match="two distinct step sizes other than 0"):
        fit(etas, polynomial(etas, coefficients), [0.0] * len(etas), coefficients[0])


def test_step_sizes_measured_twice_count_once_as_a_power():
    coefficients, etas = made_up(count=2), [0.1, 0.1, 0.2, 0.2]  # two distinct ones carry a line, and no parabola
    found = fit(etas, polynomial(etas, coefficients), [1e-4] * 4, coefficients[0])
    assert found.curvature.value == pytest.approx(coefficients[1].value, rel=1e-10)
    assert found.points == 4


def test_a_batch_of_one_unit_has_a_fit_and_no_standard_error():
    etas = [0.1, 0.2, 0.4]
    coefficients = [Estimate(c, torch.zeros(1, dtype=torch.float64)) for c in (-2.0, 0.7)]
    found = fit(etas, polynomial(etas, coefficients), [0.0] * 3, coefficients[0])
    assert found.curvature.value == pytest.approx(0.7, rel=1e-12)
    assert math.isnan(standard_error(found.curvature.influence_N))


def test_rounding_noise_keeps_small_steps_from_the_fit():
    """The smallest step is nothing but noise: it would tilt a fit that did not know."""
    coefficients, etas = made_up(count=2), [1e-4, 0.1, 0.2]
    changes = polynomial(etas, coefficients)
    changes[0] = changes[0]._replace(value=changes[0].value + 5e-3)
    known = fit(etas, changes, [1e-2] * 3, coefficients[0])
    unknown = fit(etas, changes, [0.0] * 3, coefficients[0])
    assert abs(known.difference.value) < known.intercept_noise
    assert abs(unknown.difference.value) > 20 * abs(known.difference.value)


def test_standard_errors_are_right_on_average():
    """Each sequence with a parabola of its own and the noise of rounding on top: the mean square of z is 1."""
    generator = torch.Generator().manual_seed(1)
    N, replications, etas, noise = 400, 1500, [0.1, 0.3, 0.6, 1.0], 0.02
    truth = torch.tensor([-2.0, 0.7, 0.4], dtype=torch.float64)
    mix = torch.tensor([[1.0, 0.5, 0.3], [0.0, 0.5, 0.4], [0.0, 0.0, 0.3]], dtype=torch.float64)
    powers_JP = torch.tensor([[eta, eta**2, eta**3] for eta in etas], dtype=torch.float64)
    squares = []
    for _ in range(replications):
        own_NP = truth + torch.randn(N, 3, generator=generator, dtype=torch.float64) @ mix
        rounding_J = noise / 2 * torch.randn(4, generator=generator, dtype=torch.float64)
        change_NJ = own_NP @ powers_JP.T
        mean_J = change_NJ.mean(0)
        changes = [Estimate(float(mean_J[j] + rounding_J[j]), change_NJ[:, j] - mean_J[j]) for j in range(4)]
        derivative = Estimate(float(own_NP[:, 0].mean()), own_NP[:, 0] - own_NP[:, 0].mean())
        found = fit(etas, changes, [noise] * 4, derivative)
        errors = [found.intercept.value + 2.0, found.curvature.value - 0.7, found.difference.value]
        variances = [
            standard_error(estimate.influence_N) ** 2 + of_noise**2
            for estimate, of_noise in zip(
                found[:3], (found.intercept_noise, found.curvature_noise, found.intercept_noise), strict=True
            )
        ]
        squares.append([error**2 / variance for error, variance in zip(errors, variances, strict=True)])
    squares_R3 = torch.tensor(squares, dtype=torch.float64)
    # 1 for a normal law with known variance; (N − 1)/(N − 3) with an estimated one
    distance_3 = (squares_R3.mean(0) - (N - 1) / (N - 3)).abs()
    assert (distance_3 < 4 * squares_R3.std(0) / math.sqrt(replications)).all()


# --- on the enumerated policy ----------------------------------------------------------------------------------------

NAMES = {"per_token": "H_tok", "per_sequence": "H_seq"}


@pytest.fixture(scope="module")
def everything(world: World, v: dict[str, Tensor]) -> Everything:
    return enumerate_world(world, v)


class Exactly:
    """H of the enumerated policy along v."""

    def __init__(self, everything: Everything, normalization: Normalization):
        self.world, self.v, self.name = everything.world, everything.v, NAMES[normalization]
        self.at_zero = getattr(self.world.exact(), self.name).item()
        self.slope = self.world.derivative(lambda exact: getattr(exact, self.name), self.v)
        fine, coarse = ((self.change(step) + self.change(-step)) / (2 * step**2) for step in (0.005, 0.01))
        self.half_second = (4 * fine - coarse) / 3  # without the fourth order

    def change(self, eta: float) -> float:
        return getattr(self.world.exact_at(self.v, eta), self.name).item() - self.at_zero


def measured(batch: Everything, etas: list[float], normalization: Normalization) -> tuple[list[Estimate], Estimate]:
    """ΔH by `per_decision` at each step size, and ∂_vH."""
    columns, base = batch.columns("time_loo"), batch.base("time_loo")
    at_zero = uncertainty.entropy(columns[ENTROPY].total_N, columns[LENGTH].total_N, normalization)
    changes = []
    for eta in etas:
        moved = per_decision(batch.at(eta), base)
        changes.append(uncertainty.entropy(*moved, normalization).minus(at_zero))
    return changes, uncertainty.entropy_derivative(columns, normalization)


def errors(estimate: Estimate, truth: float) -> float:
    return (estimate.value - truth) / standard_error(estimate.influence_N)


@both
@pytest.mark.parametrize("etas", [[0.01, 0.03, 0.1, 0.3, 1.0], [-0.1, -0.05, 0.05, 0.1], [0.02, 0.05]], ids=str)
def test_intercept_and_curvature_are_those_of_the_enumerated_policy(
    everything: Everything, etas: list[float], normalization: Normalization
):
    """At η = 1 the third and fourth order are no smaller than the second: they must not pass for certainty."""
    exact = Exactly(everything, normalization)
    changes, derivative = measured(everything.drawn(3000), etas, normalization)
    found = fit(etas, changes, [0.0] * len(etas), derivative)
    assert abs(errors(found.intercept, exact.slope)) < 4
    assert abs(errors(found.curvature, exact.half_second)) < 4
    # given the same weights, what the exact ΔH would have for a difference, which is not quite zero
    exactly = [change._replace(value=exact.change(eta)) for change, eta in zip(changes, etas, strict=True)]
    expected: LinearityFit = fit(etas, exactly, [0.0] * len(etas), derivative._replace(value=exact.slope))
    assert abs(errors(found.difference, expected.difference.value)) < 4
    assert abs(found.difference.value) < 0.01 * standard_error(derivative.influence_N)


@both
def test_opposite_steps_leave_odd_and_even_orders(everything: Everything, normalization: Normalization):
    """What is left of ηH' falls as η³, and of ½η²H'' as η⁴."""
    exact = Exactly(everything, normalization)
    etas = torch.logspace(-1.5, -0.8, 5, dtype=torch.float64).tolist()
    both_ways = [sign * eta for eta in etas for sign in (1, -1)]
    none_N = torch.zeros(1, dtype=torch.float64)
    found = pairs(both_ways, [Estimate(exact.change(eta), none_N) for eta in both_ways])
    assert [pair.eta for pair in found] == etas
    log_eta = np.log(etas)
    for left, order in (
        ([pair.odd.value - pair.eta * exact.slope for pair in found], 3),
        ([pair.even.value - pair.eta**2 * exact.half_second for pair in found], 4),
    ):
        assert np.polyfit(log_eta, np.log(np.abs(left)), 1)[0] == pytest.approx(order, abs=0.05)


def test_pairs_by_hand():
    N = 3
    changes = [Estimate(float(c), torch.full((N,), float(c)).double()) for c in (1, 5, 2, -3, 7, 0)]
    found = pairs([0.1, 0.2, -0.1, -0.3, -0.2, 0.0], changes)
    assert [(pair.eta, pair.odd.value, pair.even.value) for pair in found] == [(0.1, -0.5, 1.5), (0.2, -1.0, 6.0)]
    for pair in found:
        assert (pair.odd.influence_N == pair.odd.value).all() and (pair.even.influence_N == pair.even.value).all()
    assert pairs([0.1, 0.2, 0.0], changes[:3]) == []
