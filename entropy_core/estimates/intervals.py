"""The three intervals of a change of the entropy, for three questions.

this update   what does the step on this U do?                 randomness of E
mean update   what do steps on batches like U do on average?   randomness of E and of U
next update   what will the step on another U do?              randomness of E, of U, and of the other U
"""

import math
from typing import Any, NamedTuple

from entropy_core.estimates import distributions
from entropy_core.numerics import uncertainty
from entropy_core.numerics.half_samples import OverU

Row = dict[str, Any]

LARGEST_CURVATURE = 0.5
"""Largest |curvature|/|δH₁| at which a curved change has intervals over U: their width is that of δH₁, corrected to
first order."""

DRAWS_OF_U = {"mean_update": 1, "next_update": 2}
"""How many draws of U the estimate and what an interval is for differ by."""


class Randomness(NamedTuple):
    """What intervals need: the number of independent units of E, the error of ∂_vH over U, and whether E allows any.

    `invalid_over_e` says why no interval over E is valid; empty if they are.
    """

    units_e: int
    over_u: OverU
    invalid_over_e: str = ""


def intervals(
    prefix: str, value: float, se_given_u: float, randomness: Randomness, eta: float, level: float, widen: float = 1.0
) -> tuple[Row, Row]:
    """Compute the three intervals of a change, and the p-values of a change of 0 for this and for the mean update.

    Args:
        prefix: of the names of the columns.
        value: the estimate, nats.
        se_given_u: its standard error over E.
        randomness: of E, and of ∂_vH over U; times η and `widen` it is that of the estimate.
        eta: absolute step size.
        level: confidence level.
        widen: factor of the standard error over U; infinite for none.

    Returns:
        The columns of the intervals, None where there is no valid one, and p-values by interval.
    """
    units_e, over_u, invalid_over_e = randomness
    scale = widen * abs(eta)
    of_e = uncertainty.Total(se_given_u, float(units_e - 1))
    totals: dict[str, uncertainty.Total | None] = {"this_update": None if invalid_over_e else of_e}
    for name, draws in DRAWS_OF_U.items():
        totals[name] = None
        if not over_u.invalid and not invalid_over_e and math.isfinite(widen):
            parts = over_u.standard_error * scale, over_u.degrees_of_freedom + 1, over_u.interaction * scale**2
            totals[name] = uncertainty.total_standard_error(se_given_u, units_e, *parts, draws)
    row: Row = {}
    p_values: Row = {}
    for name, total in totals.items():
        half, p_value = None, None
        if total is not None:
            half = distributions.t_quantile(0.5 + level / 2, total.degrees_of_freedom) * total.standard_error
            z = abs(value) / total.standard_error if total.standard_error else math.inf if value else 0.0
            p_value = 2 * distributions.t_tail(z, total.degrees_of_freedom)
        row[f"{prefix}{name}_low"] = None if half is None else value - half
        row[f"{prefix}{name}_high"] = None if half is None else value + half
        p_values[name] = p_value
    return row, p_values


def widened(first: float, curvature: float) -> float:
    """Return the factor of the standard error of δH₁ over U that gives that of a curved change.

    A step longer by a small share of itself changes δH₁ by this share, and the curvature by twice as much.

    Args:
        first: δH₁, nats.
        curvature: what the change is more than δH₁, nats.

    Returns:
        |1 + 2·curvature/δH₁|, but at least 1; infinite if the curvature is above `LARGEST_CURVATURE` of δH₁.
    """
    if first == curvature == 0.0:
        return 1.0
    if abs(curvature) > LARGEST_CURVATURE * abs(first):
        return math.inf
    return max(1.0, abs(1 + 2 * curvature / first))
