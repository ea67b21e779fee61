"""What a noisy series says at one time: a straight line through its neighbouring values."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST = 4
"""Values from which the scatter about a line can be told: a line takes two of them."""


class Level(NamedTuple):
    """A series at one time.

    Attributes:
        value: of the line.
        standard_error: of the value, from the scatter of the series about the line, and from how much it bends.
        scatter: standard deviation of a single value about the line.
        degrees_of_freedom: of the scatter.
    """

    value: float
    standard_error: float
    scatter: float
    degrees_of_freedom: float


def level_at(times: Sequence[float], values: Sequence[float], time: float) -> Level:
    """Read a series off at a time, within its values or beyond them, by least squares.

    With residuals r_i of a straight line through n values, s² = Σr²/(n − 2). The squared standard error is
    s²·(1/n + (t − t̄)²/Σ(t_i − t̄)²), to which the squared distance to the least-squares parabola at t is added: a series
    that bends is known less well.

    Args:
        times: all different; at least `FEWEST`.
        values: of the series.
        time: t.

    Returns:
        The line at t, with its error.

    Raises:
        ValueError: there are too few values.
    """
    n = len(values)
    if n < FEWEST:
        raise ValueError(f"{n} values do not tell their scatter about a line")
    from_t_n, y_n = torch.tensor(times, dtype=torch.float64) - time, torch.tensor(values, dtype=torch.float64)
    line_n, at_t = _least_squares(from_t_n, y_n, 1)
    _, parabola_at_t = _least_squares(from_t_n, y_n, 2)
    residuals_n = y_n - line_n
    scatter = math.sqrt(float(residuals_n @ residuals_n) / (n - 2))
    centred_n = from_t_n - from_t_n.mean()
    leverage = 1 / n + float(from_t_n.mean() ** 2 / (centred_n @ centred_n))
    return Level(at_t, math.hypot(scatter * math.sqrt(leverage), at_t - parabola_at_t), scatter, n - 2)


def _least_squares(from_t_n: Tensor, y_n: Tensor, degree: int) -> tuple[Tensor, float]:
    """The values of a polynomial at all times, and at t."""
    X_np = (from_t_n / from_t_n.abs().max())[:, None] ** torch.arange(degree + 1)
    coefficients_p = torch.linalg.solve(X_np.T @ X_np, X_np.T @ y_n)
    return X_np @ coefficients_p, float(coefficients_p[0])
