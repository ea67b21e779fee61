"""How large E and U have to be: power as simulated, the cheapest sizes by going through all, costs of a run."""

import math

import pytest
import torch
from scipy import stats

from entropy_core.estimates import power
from entropy_core.estimates.distributions import noncentral_t_below, t_tail, t_test_power
from entropy_core.estimates.power import Components, Size, TTest, best_for, even_split, smallest_e
from entropy_core.numerics import uncertainty

PILOT = {"se_given_u": 3e-4, "se_over_u": 5e-4, "se_interaction": 1e-4, "nonlinearity_over_u": None}
PILOT |= {"excess_kurtosis": 1.0}
SIZE = Size(1024, 64)


def test_the_components_give_back_the_errors_of_the_pilot():
    mean_update = Components.of_pilot(PILOT, SIZE, given_u=False)
    both = PILOT["se_interaction"] ** 2
    assert mean_update.standard_error(SIZE) ** 2 == pytest.approx(9e-8 + 25e-8 - both, rel=1e-12)
    assert Components.of_pilot(PILOT, SIZE, given_u=True).standard_error(SIZE) == pytest.approx(3e-4, rel=1e-12)
    # four times as many of each: half of the error, but for the interaction
    expected = (9e-8 - both) / 4 + (25e-8 - both) / 4 + both / 16
    assert mean_update.standard_error(Size(4096, 256)) ** 2 == pytest.approx(expected, rel=1e-12)


def test_the_degrees_of_freedom_are_those_of_the_rows():
    """Of a step that is not linear those of the splits of U, and of a difference those of the blocks of E."""
    bent = Components.of_pilot(PILOT | {"nonlinearity_over_u": 0.2}, SIZE, given_u=False)
    assert (bent.freedom_e, bent.freedom_u) == (None, 7.0)
    assert bent.degrees_of_freedom(SIZE) < Components.of_pilot(PILOT, SIZE, given_u=False).degrees_of_freedom(SIZE)
    total = uncertainty.Total(math.hypot(3e-4, 5e-4), 34e-8**2 / (9e-8**2 / 15 + 25e-8**2 / 63))
    row = {"se_over_e": 3e-4, "se_over_u": 5e-4, "se_interaction": 2e-4, "degrees_of_freedom": total.degrees_of_freedom}
    of_blocks = Components.of_difference(row, SIZE, False, 16)
    assert of_blocks.freedom_e == pytest.approx(15) and of_blocks.standard_error(SIZE) == pytest.approx(total[0])
    given_u = Components.of_difference(row, SIZE, True, 16)
    assert given_u.degrees_of_freedom(Size(4096, 64)) == pytest.approx(15)  # more of E brings none
    this_update = Components.of_difference(row | {"se_over_u": None, "degrees_of_freedom": None}, SIZE, True, 16)
    assert this_update.degrees_of_freedom(SIZE) == pytest.approx(15)


def test_the_noncentral_t_is_that_of_scipy():
    for value, degrees, shift in ((1.5, 7.0, 0.0), (2.1, 30.5, 2.8), (-2.1, 12.0, 1.0)):
        assert noncentral_t_below(value, degrees, shift) == pytest.approx(
            stats.nct.cdf(value, degrees, shift), abs=1e-9
        )
    assert noncentral_t_below(1.5, 7.0, 0.0) == pytest.approx(1 - t_tail(1.5, 7.0), abs=1e-12)


@pytest.mark.parametrize(("size", "given_u"), [(Size(60, 12), False), (Size(200, 8), False), (Size(40, 16), True)])
def test_the_planned_power_is_that_of_simulated_sweeps(size: Size, given_u: bool):
    """Effects of units of E and of prompts of U are drawn, and tested as a sweep tests them."""
    components, test = Components(4.0, 2.0, 0.0, given_u), TTest(0.95)
    effect = test.detectable(components, size)
    assert test.power_at(components, size, effect) == pytest.approx(0.8, abs=1e-6)
    generator = torch.Generator().manual_seed(5)
    sweeps, detected = 20_000, 0
    for _ in range(sweeps):
        of_e = 2.0 * torch.randn(size.of_e, generator=generator, dtype=torch.float64)
        of_u = 2.0**0.5 * torch.randn(size.of_u, generator=generator, dtype=torch.float64)
        value = effect + float(of_e.mean()) + (0.0 if given_u else float(of_u.mean()))
        over_e = uncertainty.standard_error(of_e - of_e.mean())
        over_u = uncertainty.clustered_sum_standard_error((of_u / size.of_u).unsqueeze(1))
        total = uncertainty.total_standard_error(over_e, size.of_e, over_u, size.of_u)
        if given_u:
            total = uncertainty.Total(over_e, size.of_e - 1.0)
        detected += 2 * t_tail(abs(value) / total.standard_error, total.degrees_of_freedom) <= 0.05
    assert abs(detected / sweeps - 0.8) <= 0.02


def test_a_plan_from_a_small_pilot_holds_on_average_over_pilots():
    """The pilot's variance is drawn, the effect goes by it, and so does the power that is asked for."""
    generator, pilots = torch.Generator().manual_seed(6), 40_000
    for known, degrees in ((15, 15), (7, 60), (3, 5)):
        components = Components(1.0, 0.0, 0.0, True, float(degrees), known_e=float(known))
        size, test = Size(100, 8), TTest(0.95)
        shift = test.detectable(components, size) / components.standard_error(size)
        assert test.power_at(components, size, shift * components.standard_error(size)) == pytest.approx(0.8, abs=1e-6)
        assert shift > test.detectable(components._replace(known_e=None), size) / components.standard_error(size)
        normal = torch.randn(pilots, 1 + known + degrees, generator=generator, dtype=torch.float64)
        estimated, tested = normal[:, 1 : 1 + known], normal[:, 1 + known :]
        value = shift * estimated.square().mean(1).sqrt() + normal[:, 0]
        t = value / tested.square().mean(1).sqrt()
        detected = float((t.abs() > stats.t.ppf(0.975, degrees)).double().mean())
        assert abs(detected - 0.8) <= 0.008, (known, degrees)


def test_a_power_is_a_number_wherever_the_library_has_none():
    for degrees, shift, reach in ((60.0, 40.0, 2.1), (1000.0, 8.0, 2.1), (1e9, 8.0, 2.0), (15.0, 1e6, 2.1)):
        for known in (math.inf, 15.0):
            assert 0.999 < t_test_power(reach, degrees, shift, known) <= 1.0
    assert t_test_power(2.1, 15.0, 0.0, 15.0) == pytest.approx(2 * t_tail(2.1, 15.0), abs=1e-9)


def test_the_interaction_of_a_difference_falls_with_both_sizes():
    row = {"se_over_e": 3e-4, "se_over_u": 5e-4, "se_interaction": 2e-4, "degrees_of_freedom": None}
    components = Components.of_difference(row, SIZE, False, 16)
    over_e, over_u = components.variances(Size(1024, 128))
    assert over_e == pytest.approx(9e-8 - 4e-8 + 4e-8 / 2) and over_u == pytest.approx(25e-8 / 2)
    before = row | {"se_interaction": None}  # of a run whose rows did not have it yet
    assert Components.of_difference(before, SIZE, False, 16).variances(Size(1024, 128))[0] == pytest.approx(9e-8)


def test_the_cheapest_sizes_are_the_cheapest_of_all():
    components, test, seconds = Components(9.0, 1.5, 0.4), TTest(0.95), (0.5, 4.0)
    found = power.cheapest(test, components, 1.3, seconds)
    assert found is not None and test.power_at(components, found, 1.3) >= 0.8
    by_all = [
        Size(of_e, of_u) for of_u in range(2, 60) if (of_e := power.smallest_e(test, components, 1.3, of_u)) is not None
    ]
    assert power.cost(found, seconds) == pytest.approx(min(power.cost(size, seconds) for size in by_all))
    assert power.cost(found, seconds) < power.cost(Size(1 + by_all[-1].of_e, 60), seconds)


def test_the_smallest_e_is_just_large_enough():
    components, test = Components(9.0, 0.0, 0.0, True), TTest(0.95)
    of_e = power.smallest_e(test, components, 0.5, 8)
    assert of_e is not None
    assert test.power_at(components, Size(of_e, 8), 0.5) >= 0.8 > test.power_at(components, Size(of_e - 1, 8), 0.5)
    # no E makes up for too few prompts
    assert power.smallest_e(test, Components(9.0, 4.0, 0.0), 0.5, 8) is None
    assert power.cheapest(test, Components(9.0, 1e30, 0.0), 1e-9, (1.0, 1.0)) is None


def test_the_best_split_of_a_budget_beats_the_even_one():
    components, seconds, budget = Components(9.0, 1.5, 0.4), (0.5, 4.0), 400.0
    test = TTest(0.95)
    best, even = power.best_for(test, components, seconds, budget), power.even_split(components, seconds, budget)
    assert best is not None and even == Size(400, 50) and power.cost(best, seconds) <= budget
    assert test.detectable(components, best) < test.detectable(components, even)
    every = [Size(max(2, int((budget - u * 4.0) / 0.5)), u) for u in range(2, 99)]
    assert test.detectable(components, best) == pytest.approx(min(test.detectable(components, size) for size in every))
    assert power.best_for(test, components, seconds, 1.0) is None


def test_without_any_variance_every_change_is_told():
    nothing = Components(0.0, 0.0, 0.0)
    assert TTest(0.95).detectable(nothing, SIZE) == 0.0
    assert TTest(0.95).power_at(nothing, SIZE, 0.0) == pytest.approx(0.05)
    assert math.isfinite(nothing.degrees_of_freedom(SIZE))


def test_every_block_of_e_has_some_units():
    """An effect as large as this would need a handful of responses, of which no block could say how sure it is."""
    row = {"se_over_e": 0.1, "se_over_u": 0.1, "se_interaction": None, "degrees_of_freedom": None}
    components = Components.of_difference(row, Size(64, 16), True, 16)
    assert smallest_e(TTest(0.95), components, 100.0, 16) == 64
    test = TTest(0.95)
    assert best_for(test, components, (1.0, 1.0), 63.0) is None
    assert best_for(test, components, (1.0, 1.0), 70.0).of_e >= 64
    assert even_split(components, (1.0, 1.0), 126.0) is None  # half of it does not buy them
    assert even_split(components, (1.0, 1.0), 128.0) == Size(64, 64)
