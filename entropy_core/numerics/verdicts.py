"""Verdict on a row of the result table, with the rule that gave it."""

from typing import Literal, NamedTuple

Word = Literal["reference", "resolved", "noise-limited", "nonlinear", "weights-unreliable"]

MINIMUM_ESS_FRACTION = 0.1
MATERIAL_CURVATURE = 0.05  # below it, the log-log slope of ΔH against η is within about half a per cent of 1
EVEN_ESS_FRACTION = 0.9  # above it the weights are nearly equal, and the shape of their tail does not matter


class Verdict(NamedTuple):
    """A verdict and the rule that gave it."""

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
    pareto_k: float | None,
    pareto_k_threshold: float,
    noise_floor: float,
    quantile: float,
) -> Verdict:
    """Return the verdict of the first rule that applies, in the order reference, weights, nonlinear, noise, resolved.

    Args:
        eta: absolute step size.
        delta_h1: first-order prediction, nats.
        delta_h: measured change, nats; NaN if the weights overflowed.
        delta_h_se: standard error of `delta_h`.
        curvature: ΔH − η·(derivative of the same estimator), nats.
        curvature_se: standard error of `curvature`.
        ess_fraction: effective sample size divided by the number of sequences.
        pareto_k: k̂ of the whole-sequence weights; None if there is no tail to fit.
        pareto_k_threshold: largest k̂ at which a mean of that many weights can be trusted.
        noise_floor: numerical noise of ΔH, nats.
        quantile: normal quantile of the confidence level.

    Returns:
        The verdict.
    """
    if eta == 0:
        return Verdict("reference", "eta = 0: no change by definition")
    if not ess_fraction >= MINIMUM_ESS_FRACTION or delta_h != delta_h:
        return Verdict("weights-unreliable", f"ESS/N < {MINIMUM_ESS_FRACTION:g}")
    if pareto_k is not None and pareto_k > pareto_k_threshold and ess_fraction < EVEN_ESS_FRACTION:
        return Verdict("weights-unreliable", f"Pareto k > {pareto_k_threshold:.2f} and ESS/N < {EVEN_ESS_FRACTION:g}")
    material = abs(curvature) > MATERIAL_CURVATURE * abs(delta_h1)
    if material and abs(curvature) > quantile * curvature_se + noise_floor:
        return Verdict("nonlinear", f"|curvature| > {MATERIAL_CURVATURE:.0%} of |dH1| and > {quantile:.2f} of its SE")
    if abs(delta_h) <= quantile * delta_h_se + noise_floor:
        return Verdict("noise-limited", f"|dH| <= {quantile:.2f} SE + noise floor")
    return Verdict("resolved", f"|dH| > {quantile:.2f} SE + noise floor, curvature not material")
