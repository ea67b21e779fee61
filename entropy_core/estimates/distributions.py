"""Quantiles and probabilities of Student's t, central and not, and of χ². The only importer of scipy.

They come from `scipy.special`: `scipy.stats`, which calls the same functions, takes four times as long to import.
"""

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


def noncentral_t_below(value: float, degrees_of_freedom: float, shift: float) -> float:
    """Return the probability that the noncentral t, of Z + `shift` over its estimated error, is below a value."""
    if value <= 0 and shift > 10:  # less than 1e-18, for which the library gives NaN
        return 0.0
    return float(special.nctdtr(degrees_of_freedom, shift, value))
