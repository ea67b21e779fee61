"""What a row of the result table is worth, by a rule that it names."""

from typing import Literal, NamedTuple

Word = Literal["reference", "resolved", "noise-limited", "nonlinear", "weights-unreliable"]

MINIMUM_ESS_FRACTION = 0.1
MATERIAL_CURVATURE = 0.1


class Verdict(NamedTuple):
    """A word and the rule that gave it."""

    word: Word
    rule: str


def verdict(
    *,
    eta: float,
    delta_h1: float,
    delta_h: float,
    delta_h_se: float,
    curvature: float,
    curvature_se: float,
    ess_fraction: float,
    noise_floor: float,
    quantile: float,
) -> Verdict:
    """The first rule that applies, in the order reference, weights, nonlinear, noise, resolved.

    Args:
        eta: absolute step size.
        delta_h1: first-order prediction, nats.
        delta_h: measured change, nats; NaN when the weights overflowed.
        delta_h_se: its standard error.
        curvature: ΔH − η·(derivative of the same estimator).
        curvature_se: its standard error.
        ess_fraction: effective sample size over N.
        noise_floor: numerical noise of ΔH, nats.
        quantile: normal quantile of the confidence level.

    Returns:
        The verdict.
    """
    if eta == 0:
        return Verdict("reference", "eta = 0: no change by definition")
    if not ess_fraction >= MINIMUM_ESS_FRACTION or delta_h != delta_h:
        return Verdict("weights-unreliable", f"ESS/N < {MINIMUM_ESS_FRACTION:g}")
    material = abs(curvature) > MATERIAL_CURVATURE * abs(delta_h1)
    if material and abs(curvature) > quantile * curvature_se + noise_floor:
        return Verdict("nonlinear", f"|curvature| > {MATERIAL_CURVATURE:.0%} of |dH1| and > {quantile:.2f} of its SE")
    if abs(delta_h) <= quantile * delta_h_se + noise_floor:
        return Verdict("noise-limited", f"|dH| <= {quantile:.2f} SE + noise floor")
    return Verdict("resolved", f"|dH| > {quantile:.2f} SE + noise floor, curvature not material")
