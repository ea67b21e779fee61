"""Verdicts on a row of the result table: one for each question, and one word for all of them.

    sign            is the sign of ΔH known: for this update, for the mean update, for the next update?
    linearity       is the curvature within 5 % of δH₁, beyond it, or is that not known?
    above_rounding  is ΔH larger than what rounding alone produces?
    weights         can the importance weights be trusted?

None of them is another in disguise: a curvature that is not significant is not small, and a sign may be known without
the size.
"""

from typing import Literal, NamedTuple

from entropy_core.numerics.uncertainty import Estimate

Word = Literal["reference", "resolved", "noise-limited", "nonlinear", "weights-unreliable"]
Sign = Literal["positive", "negative", "unknown"]
Linearity = Literal["linear", "nonlinear", "undecided"]

MATERIAL_CURVATURE = 0.05  # below it, the log-log slope of ΔH against η is within about half a per cent of 1
MINIMUM_ESS_FRACTION = 0.5  # below it, intervals of ΔH cover less than they say, whatever Pareto k
EVEN_ESS_FRACTION = 0.9  # above it the weights are nearly equal, and the shape of their tail does not matter


class Verdict(NamedTuple):
    """A verdict and the rule that gave it."""

    word: Word
    rule: str


def sign(low: float | None, high: float | None) -> Sign:
    """Return the sign of all numbers between the ends of an interval; unknown if it holds 0 or there is none."""
    if low is None or high is None or low <= 0.0 <= high:
        return "unknown"
    return "positive" if low > 0 else "negative"


def bounds(curvature: Estimate, prediction: Estimate) -> tuple[Estimate, Estimate]:
    """Return curvature − m and curvature + m with m = 5 % of |δH₁|, for the two one-sided tests of `linearity`.

    Args:
        curvature: ΔH − η·(derivative of the same estimator).
        prediction: δH₁ on the same batch.

    Returns:
        Both, with their influences.
    """
    margin = prediction.scaled(MATERIAL_CURVATURE if prediction.value >= 0 else -MATERIAL_CURVATURE)
    return curvature.minus(margin), curvature.plus(margin)


def linearity(above: float, above_se: float, below: float, below_se: float, quantile: float) -> Linearity:
    """Test |curvature| against 5 % of |δH₁|, from both sides.

    Linear means that the whole interval of the curvature is within ±m (two one-sided tests, or equivalence test), and
    nonlinear that all of it is beyond.

    Args:
        above: curvature − m, nats; see `bounds`.
        above_se: its standard error.
        below: curvature + m, nats.
        below_se: its standard error.
        quantile: t quantile of the confidence level.

    Returns:
        The verdict.
    """
    if above < -quantile * above_se and below > quantile * below_se:
        return "linear"
    if above > quantile * above_se or below < -quantile * below_se:
        return "nonlinear"
    return "undecided"


def weights_reliable(ess_fraction: float, pareto_k: float | None, pareto_k_threshold: float) -> bool:
    """Tell if intervals of ΔH can be trusted under these importance weights.

    Args:
        ess_fraction: effective sample size of the whole-sequence weights, divided by the number of sequences.
        pareto_k: k̂ of the weights; None if there is no tail to fit.
        pareto_k_threshold: largest k̂ at which a mean of that many weights can be trusted.

    Returns:
        True for ESS/N of at least 1/2, and a light tail unless the weights are nearly equal.
    """
    heavy = pareto_k is not None and pareto_k > pareto_k_threshold and ess_fraction < EVEN_ESS_FRACTION
    return ess_fraction >= MINIMUM_ESS_FRACTION and not heavy


def verdict(
    *,
    eta: float,
    weights_reliable: bool,
    above_rounding: bool,
    sign_this_update: Sign,
    linearity: Linearity,
    invalid_over_e: str = "",
) -> Verdict:
    """Return one word for the answers of a row, by the first rule that applies.

    Without reliable weights nothing else is known, and without a sign no shape: noise outranks nonlinearity.

    Args:
        eta: absolute step size.
        weights_reliable: see `weights_reliable`.
        above_rounding: whether |ΔH| is above the noise floor.
        sign_this_update: sign of ΔH for this update.
        linearity: see `linearity`.
        invalid_over_e: why no interval over E is valid; empty if they are.

    Returns:
        The verdict.
    """
    if eta == 0:
        return Verdict("reference", "eta = 0: no change by definition")
    if not weights_reliable:
        return Verdict("weights-unreliable", f"ESS/N < {MINIMUM_ESS_FRACTION:g}, or a heavy tail of the weights")
    if not above_rounding:
        return Verdict("noise-limited", "|dH| <= noise floor: rounding alone may produce it")
    if invalid_over_e:
        return Verdict("noise-limited", f"no valid interval over E: {invalid_over_e}")
    if sign_this_update == "unknown":
        return Verdict("noise-limited", "the interval of dH for this update holds 0")
    if linearity == "nonlinear":
        return Verdict("nonlinear", f"the interval of |curvature| is above {MATERIAL_CURVATURE:.0%} of |dH1|")
    known = f"|curvature| is {'below' if linearity == 'linear' else 'not shown to be below or above'}"
    return Verdict("resolved", f"the sign of dH is known for this update; {known} {MATERIAL_CURVATURE:.0%} of |dH1|")
