"""Sizes of E and U that detect a change of the entropy: power from the variance components that a pilot estimated.

With N independent units of E and P prompts of U, the variance of the estimate for the mean update is

    A/N + B/P + C/(N·P)

with A the component of the units of E, B that of the prompts of U, and C that of their interaction. For this update, U
is fixed, and the variance is A/N + C/(N·P). The power of the t test is that of the noncentral t distribution. B/P
assumes a step that is linear in the gradient: twice the prompts, half the variance over U.

A pilot estimates A and B with few degrees of freedom where it is small, and a pilot that happens to underestimate them
gives sizes that are too small. The power is therefore averaged over the true variances that the estimate may stand for
(scaled inverse χ²): over many pilots, the stated share of changes is detected.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from entropy_core.estimates.distributions import t_quantile, t_test_power
from entropy_core.numerics.half_samples import LINEAR, balanced_halves

FEWEST = 2
"""Fewest units of E, and prompts of U: a sample variance needs two."""
MOST = 10**9
"""Largest number of units that a search tries before it gives up."""
IN_A_BLOCK = 4
"""Fewest units per block of E: with one or two, the value of a block depends on which units they are."""


class Size(NamedTuple):
    """Independent units of E (sequences, or prompts if their responses depend on each other), and prompts of U."""

    of_e: int
    of_u: int


class Components(NamedTuple):
    """The variance components A, B and C (`of_e`, `of_u`, `of_both`), in nats², and how well they are known.

    Args:
        of_e: A; variance over E times the units of E.
        of_u: B; variance over U times the prompts of U.
        of_both: C; variance of the interaction times both.
        given_u: whether U is held fixed; B then does not count.
        freedom_e: degrees of freedom of the error over E if it comes from a fixed number of blocks; None: units − 1.
        freedom_u: the same over U, from a fixed number of splits; None: prompts − 1.
        fewest_e: fewest units of E for which the t test is used.
        known_e: degrees of freedom with which the pilot estimated A; None: A is known exactly.
        known_u: the same of B.
    """

    of_e: float
    of_u: float
    of_both: float
    given_u: bool = False
    freedom_e: float | None = None
    freedom_u: float | None = None
    fewest_e: int = FEWEST
    known_e: float | None = None
    known_u: float | None = None

    @classmethod
    def of_pilot(cls, row: Mapping[str, Any], size: Size, given_u: bool) -> "Components":
        """Find the components from the errors of a sweep.

        Args:
            row: with `se_given_u`, `se_over_u`, `se_interaction`, `nonlinearity_over_u` and `excess_kurtosis`, as in
                `estimate_columns.ESTIMATES`.
            size: of its E and U.
            given_u: whether the question is of this update.

        Returns:
            The components; what would be negative is 0.
        """
        both = row["se_interaction"] ** 2
        over_e, over_u = (max(row[name] ** 2 - both, 0.0) for name in ("se_given_u", "se_over_u"))
        bent = (row["nonlinearity_over_u"] or 0.0) > LINEAR  # then the error over U is that of steps on halves of it
        freedom_u = float(len(balanced_halves(size.of_u))) if bent else None
        parts = over_e * size.of_e, over_u * size.of_u, both * size.of_e * size.of_u
        # Heavy tails make a sample variance less certain: Var(s²) ≈ σ⁴·(2 + excess kurtosis)/(n − 1).
        known_e = (size.of_e - 1) / max(1.0 + row["excess_kurtosis"] / 2, 1.0)
        known = {"known_e": max(1.0, known_e), "known_u": freedom_u or size.of_u - 1.0}
        return cls(*parts, given_u, freedom_u=freedom_u, **known)

    @classmethod
    def of_difference(cls, row: Mapping[str, Any], size: Size, given_u: bool, blocks: int) -> "Components":
        """Find the components of the difference that an intervention makes, whose error over E is one of blocks of E.

        Args:
            row: with `se_over_e`, `se_over_u`, `se_interaction` and `degrees_of_freedom`, as in interventions.parquet.
            size: of its E and U.
            given_u: whether the question is of this update.
            blocks: number of blocks of E, for a row without degrees of freedom.

        Returns:
            The components, with the degrees of freedom over E that those of the row are made of.
        """
        over_e, over_u = row["se_over_e"] ** 2, (row["se_over_u"] or 0.0) ** 2
        freedom_e = float(blocks - 1)
        if row["degrees_of_freedom"] is not None and over_e:
            of_e = (over_e + over_u) ** 2 / row["degrees_of_freedom"] - over_u**2 / (size.of_u - 1)
            freedom_e = max(1.0, over_e**2 / of_e) if of_e > 0 else size.of_e - 1.0
        both = min((row.get("se_interaction") or 0.0) ** 2, over_e)
        parts = (over_e - both) * size.of_e, over_u * size.of_u, both * size.of_e * size.of_u
        known = {"known_e": freedom_e, "known_u": size.of_u - 1.0}
        return cls(*parts, given_u, freedom_e, fewest_e=IN_A_BLOCK * blocks, **known)

    def variances(self, size: Size) -> tuple[float, float]:
        """Return the variances over E and over U at a size; the interaction counts once, with E."""
        over_e = self.of_e / size.of_e + self.of_both / (size.of_e * size.of_u)
        return over_e, 0.0 if self.given_u else self.of_u / size.of_u

    def standard_error(self, size: Size) -> float:
        """Return the standard error at a size."""
        return math.sqrt(sum(self.variances(size)))

    def degrees_of_freedom(self, size: Size) -> float:
        """Return those of the t test at a size (Welch-Satterthwaite)."""
        freedom_e = size.of_e - 1.0 if self.freedom_e is None else self.freedom_e
        freedom_u = size.of_u - 1.0 if self.freedom_u is None else self.freedom_u
        return self._together(size, freedom_e, freedom_u)

    def known_by(self, size: Size) -> float:
        """Return the degrees of freedom with which the pilot estimated the variance at a size."""
        return self._together(size, *(math.inf if known is None else known for known in (self.known_e, self.known_u)))

    def _together(self, size: Size, freedom_e: float, freedom_u: float) -> float:
        """Satterthwaite's degrees of freedom of the sum of the variances over E and over U."""
        over_e, over_u = self.variances(size)
        if over_e + over_u == 0.0:
            return freedom_e
        parts = over_e**2 / freedom_e + over_u**2 / freedom_u
        return (over_e + over_u) ** 2 / parts if parts else math.inf


class TTest(NamedTuple):
    """A two-sided t test at a confidence level, and the power that is wanted of it."""

    confidence_level: float
    power: float = 0.8

    def power_at(self, components: Components, size: Size, effect: float) -> float:
        """Return the probability that a change of this size is detected, on average over pilots."""
        error = components.standard_error(size)
        if error == 0.0:
            return 1.0 if effect else 1 - self.confidence_level
        degrees, shift = components.degrees_of_freedom(size), abs(effect) / error
        critical_value = t_quantile(0.5 + self.confidence_level / 2, degrees)
        return t_test_power(critical_value, degrees, shift, components.known_by(size))

    def detectable(self, components: Components, size: Size) -> float:
        """Return the smallest change with the wanted power, nats, by bisection; 100 standard errors if none has it."""
        low, high = 0.0, 100.0 * components.standard_error(size)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self.power_at(components, size, middle) >= self.power else (middle, high)
        return high


def smallest_e(test: TTest, components: Components, effect: float, of_u: int) -> int | None:
    """Find the smallest E that detects a change.

    Args:
        test: level and power.
        components: of the variance.
        effect: size of the change to detect, nats; its sign does not matter.
        of_u: prompts of U.

    Returns:
        Units of E; None if no E is large enough with so few prompts of U.
    """
    return _smallest(lambda n: test.power_at(components, Size(n, of_u), effect) >= test.power, components.fewest_e)


def cheapest(test: TTest, components: Components, effect: float, seconds: tuple[float, float]) -> Size | None:
    """Find the cheapest E and U that detect a change.

    Args:
        test: level and power.
        components: of the variance.
        effect: size of the change to detect, nats; its sign does not matter.
        seconds: cost of one unit of E, and of one prompt of U.

    Returns:
        Their sizes; None if none within reach is large enough.
    """
    fewest = _smallest(lambda p: test.power_at(components, Size(MOST, p), effect) >= test.power)
    if fewest is None:
        return None

    def size_at(of_u: int) -> Size:
        return Size(smallest_e(test, components, effect, of_u) or MOST, of_u)

    most = 1000 * fewest  # there B/P is at most a thousandth of the variance allowed: more of U saves hardly any of E
    return size_at(_lowest(lambda of_u: cost(size_at(of_u), seconds), fewest, most))


def best_for(test: TTest, components: Components, seconds: tuple[float, float], budget: float) -> Size | None:
    """Find the E and U that detect the smallest change that a budget allows.

    Args:
        test: level and power.
        components: of the variance.
        seconds: cost of one unit of E, and of one prompt of U.
        budget: seconds.

    Returns:
        Their sizes; None if the budget does not pay for the fewest.
    """
    most = int((budget - components.fewest_e * seconds[0]) / seconds[1]) if seconds[1] else MOST
    if most < FEWEST:
        return None

    def size_at(of_u: int) -> Size:
        return Size(max(components.fewest_e, int((budget - of_u * seconds[1]) / seconds[0])), of_u)

    return size_at(_lowest(lambda of_u: test.detectable(components, size_at(of_u)), FEWEST, most))


def even_split(components: Components, seconds: tuple[float, float], budget: float) -> Size | None:
    """Return what half of a budget buys of E and half of U; None if it does not buy the fewest."""
    size = Size(*(int(budget / 2 / each) for each in seconds))
    return size if size.of_e >= components.fewest_e and size.of_u >= FEWEST else None


def cost(size: Size, seconds: tuple[float, float]) -> float:
    """Return the seconds that a size costs."""
    return size.of_e * seconds[0] + size.of_u * seconds[1]


def _smallest(enough: Callable[[int], bool], fewest: int = FEWEST) -> int | None:
    """The smallest number from `fewest` on that is enough, if more is always better; None if not even `MOST` is."""
    high = fewest
    while not enough(high):
        if high >= MOST:
            return None
        high = min(2 * high, MOST)
    low = max(fewest - 1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _lowest(value: Callable[[int], float], low: int, high: int) -> int:
    """The minimum of a function that falls and then rises, over whole numbers: ternary search, then one by one."""
    while high - low > 8:
        third = (high - low) // 3
        a, b = low + third, high - third
        low, high = (low, b) if value(a) <= value(b) else (a, high)
    return min(range(low, high + 1), key=value)
