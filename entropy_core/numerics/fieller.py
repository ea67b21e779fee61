"""The interval of a ratio of two estimates whose denominator may be near 0.

The ratio ρ = a/b is in Fieller's set where a − ρb is not told from 0:

    (a − ρb)² ≤ t²·(V_aa − 2ρV_ab + ρ²V_bb)

The set is an interval if b is told from 0, b² > t²V_bb. Otherwise it reaches to infinity, as it must: a denominator
that may be 0 allows any ratio. (E. C. Fieller, Some problems in interval estimation, J. R. Stat. Soc. B 16, 1954.)
"""

from typing import NamedTuple


class Moments(NamedTuple):
    """Two estimates a and b, their variances, and their covariance."""

    numerator: float
    denominator: float
    variance_numerator: float
    variance_denominator: float
    covariance: float


def ratio_interval(moments: Moments, quantile: float) -> tuple[float, float] | None:
    """Compute the ends of Fieller's interval of a/b.

    Args:
        moments: of a and b, in any units.
        quantile: t, the two-sided quantile of the confidence level.

    Returns:
        Both ends, in the unit of a over that of b; None if b is not told from 0, and the set is unbounded.
    """
    a, b, aa, bb, ab = moments
    square = quantile**2
    leading = b**2 - square * bb
    if leading <= 0:
        return None
    middle = a * b - square * ab
    # with b told from 0 the quadratic is negative at a/b, so that its roots are real; rounding may say otherwise
    root = max(middle**2 - leading * (a**2 - square * aa), 0.0) ** 0.5
    return (middle - root) / leading, (middle + root) / leading
