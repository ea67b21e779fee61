"""Quantiles and probabilities of Student's t, central and not, and of χ². The only importer of scipy.

They come from `scipy.special`: `scipy.stats`, which calls the same functions, takes four times as long to import.
"""

from functools import cache
from typing import Any

from scipy import special


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the value below which Student's t is with this probability; NaN without degrees of freedom."""
    return float(special.stdtrit(degrees_of_freedom, probability))


def t_tail(value: float, degrees_of_freedom: float) -> float:
    """Return the probability that Student's t is above a value; NaN without degrees of freedom."""
    return float(special.stdtr(degrees_of_freedom, -value))


def chi_squared_tail(value: float, degrees_of_freedom: float) -> float:
    """Return the probability that χ² is above a value."""
    return float(special.chdtrc(degrees_of_freedom, value))


NODES = 12
"""Of the mean over a χ²: its error is below 0.001 with 1 degree of freedom, and far less with more."""
KNOWN = 1e5
"""Degrees of freedom from which a variance counts as known."""
CERTAIN, FAR = 100.0, 6.0
"""A shift of the noncentral t beyond which no test misses it, and one beyond which none sees the other sign."""


def t_test_power(reach: float, degrees_of_freedom: float, shift: float, known_by: float) -> float:
    """Return the probability that |t| is above a value, if the shift goes by an estimate of the standard error.

    The variance that the test will meet is that of the estimate times ν/χ²(ν): the mean over this is the power on
    average over all pilots from which a size was computed so.

    Args:
        reach: the value.
        degrees_of_freedom: of t.
        shift: effect over the estimated standard error, at least 0.
        known_by: ν, the degrees of freedom of that estimate.

    Returns:
        The probability.
    """
    if known_by >= KNOWN:
        missed = noncentral_t_below(reach, degrees_of_freedom, min(shift, CERTAIN))
        return 1.0 - missed + (noncentral_t_below(-reach, degrees_of_freedom, shift) if shift < FAR else 0.0)
    probabilities_K, weights_K = _nodes()
    shift_K = (shift * (special.chdtri(known_by, probabilities_K) / known_by) ** 0.5).clip(max=CERTAIN)
    near_K = shift_K < FAR
    missed_K = special.nctdtr(degrees_of_freedom, shift_K, reach)
    other_K = special.nctdtr(degrees_of_freedom, shift_K[near_K], -reach)
    missed, other = (
        float(w_K[x_K == x_K] @ x_K[x_K == x_K]) for w_K, x_K in ((weights_K, missed_K), (weights_K[near_K], other_K))
    )
    return 1.0 - missed + other


@cache
def _nodes() -> tuple[Any, Any]:
    """Probabilities and weights of Gauss and Legendre between 0 and 1."""
    nodes_K, weights_K = special.roots_legendre(NODES)
    return (1.0 + nodes_K) / 2.0, weights_K / 2.0


def noncentral_t_below(value: float, degrees_of_freedom: float, shift: float) -> float:
    """Return the probability that the noncentral t, of Z + `shift` over its estimated error, is below a value."""
    found = float(special.nctdtr(degrees_of_freedom, shift, value))
    return 0.0 if found != found else found  # the library gives NaN for some of what is below 1e-12
