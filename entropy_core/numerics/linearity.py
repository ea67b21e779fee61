"""Dependence of the entropy change ΔH on the step size η: intercept and slope of ΔH(η)/η, and pairs of opposite steps.

    ΔH(η)/η = ∂_vH + ½∂²_vH·η + …            (v: the step per unit of learning rate; ∂_v: the derivative along it)

All step sizes are measured on one batch, so their errors are nearly equal. The error that they share with ∂_vH says
nothing about linearity, so the fit is weighted by the covariance of the residuals ΔH(η)/η − ∂_vH.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.uncertainty import Estimate, cluster_sums

# Assumed variance of the terms missing from the polynomial, relative to the variance at the same step size. Without it
# the fit would treat the polynomial as exact: contrasts between step sizes, in which batch noise cancels, would get all
# the weight, and a third-order term would move the curvature by many standard errors.
LACK_OF_FIT = 0.1


class LinearityFit(NamedTuple):
    """Fit of ΔH(η)/η = intercept + curvature·η (+ c·η²); `curvature` is half of ∂²_vH, in nats per squared unit of η.

    The influence values cover batch noise only. `intercept_noise` and `curvature_noise` are the standard deviations
    due to rounding, which come on top. `difference` is intercept − ∂_vH, and has the rounding noise of the intercept.
    Batch noise almost cancels in `difference`, so it shows the first order missing from the polynomial. Compare it
    with ∂_vH or with the standard error of ∂_vH rather than with its own standard error.
    """

    intercept: Estimate
    curvature: Estimate
    difference: Estimate
    intercept_noise: float
    curvature_noise: float
    points: int


class EtaPair(NamedTuple):
    """Odd part (ΔH(η) − ΔH(−η))/2 = η∂_vH + O(η³) and even part (ΔH(η) + ΔH(−η))/2 = ½η²∂²_vH + O(η⁴), for η > 0."""

    eta: float
    odd: Estimate
    even: Estimate


def fit(
    etas: Sequence[float],
    changes: Sequence[Estimate],
    noise_floors: Sequence[float],
    derivative: Estimate,
    clusters_N: Tensor | None = None,
) -> LinearityFit:
    """Fit ΔH(η)/η by generalised least squares on 1 and η, and also on η² if there are at least four step sizes.

    The covariance is computed from the influence values of ΔH_j/η_j − ∂_vH, in the convention of
    `uncertainty.standard_error`. (noise_floor_j/(2η_j))² and `LACK_OF_FIT` times each variance are added to its
    diagonal. For a fixed covariance the fit is linear in the ΔH_j, so its influence values are the same combination
    of theirs.

    Args:
        etas: step sizes; 0 is ignored.
        changes: ΔH at each step size, nats, all on the same batch.
        noise_floors: twice the root mean square of the rounding noise of each ΔH, nats.
        derivative: ∂_vH on the same batch, from the estimator that measured ΔH.
        clusters_N: int64 [N], cluster of each sequence; None for independent sequences.

    Returns:
        The fit; `points` is the number of step sizes used.

    Raises:
        ValueError: fewer than two distinct step sizes other than 0.
    """
    used = [(eta, change, noise) for eta, change, noise in zip(etas, changes, noise_floors, strict=True) if eta != 0]
    distinct = len({eta for eta, _, _ in used})
    if distinct < 2:
        raise ValueError(f"a fit against the step size needs two distinct step sizes other than 0, got {distinct}")
    eta_J = torch.tensor([eta for eta, _, _ in used], dtype=torch.float64)
    noise_J = torch.tensor([noise / (2 * abs(eta)) for eta, _, noise in used], dtype=torch.float64)
    slopes = [change.scaled(1 / eta) for eta, change, _ in used]
    influence_NJ = torch.stack([slope.influence_N for slope in slopes], dim=1)
    covariance_JJ = _covariance(influence_NJ - derivative.influence_N.unsqueeze(1), clusters_N)

    largest = float(eta_J.abs().max())
    powers_JP = (eta_J / largest).unsqueeze(1) ** torch.arange(3 if distinct >= 4 else 2)
    weights_PJ = _weights(powers_JP, covariance_JJ + torch.diag(noise_J**2))
    weights_PJ[1] /= largest

    def estimate(weights_J: Tensor) -> Estimate:
        value = sum(float(weight) * slope.value for weight, slope in zip(weights_J, slopes, strict=True))
        return Estimate(value, influence_NJ @ weights_J)

    intercept, curvature = estimate(weights_PJ[0]), estimate(weights_PJ[1])
    intercept_noise, curvature_noise = (float((weights_PJ[row] * noise_J).norm()) for row in (0, 1))
    difference = intercept.minus(derivative)
    return LinearityFit(intercept, curvature, difference, intercept_noise, curvature_noise, len(used))


def _covariance(influence_NJ: Tensor, clusters_N: Tensor | None) -> Tensor:
    sums_CJ = cluster_sums(influence_NJ, clusters_N)
    count = len(sums_CJ)
    return count / max(count - 1, 1) * (sums_CJ.T @ sums_CJ) / len(influence_NJ) ** 2


def _weights(powers_JP: Tensor, covariance_JJ: Tensor) -> Tensor:
    """Return (XᵀΣ⁻¹X)⁻¹XᵀΣ⁻¹, [P, J]; with zero covariance, the weights of ordinary least squares."""
    deviation_J = covariance_JJ.diagonal().sqrt()
    if not deviation_J.any():
        return torch.linalg.pinv(powers_JP)
    deviation_J = deviation_J.clamp_min(1e-9 * float(deviation_J.max()))
    correlation_JJ = covariance_JJ / (deviation_J.unsqueeze(1) * deviation_J)
    factor_JJ = torch.linalg.cholesky(correlation_JJ + LACK_OF_FIT * torch.eye(len(deviation_J), dtype=torch.float64))
    # whiten and use the pseudo-inverse: the normal equations would square the condition number
    white_JP = torch.linalg.solve_triangular(factor_JJ, powers_JP / deviation_J.unsqueeze(1), upper=False)
    whitener_JJ = torch.linalg.solve_triangular(factor_JJ, torch.diag(1 / deviation_J), upper=False)
    return torch.linalg.pinv(white_JP) @ whitener_JJ


def pairs(etas: Sequence[float], changes: Sequence[Estimate]) -> list[EtaPair]:
    """Return the odd and even parts of ΔH for each η > 0 if −η was measured too.

    Args:
        etas: step sizes.
        changes: ΔH at each step size, nats, all on the same batch.

    Returns:
        One pair per such η, in the order of `etas`.
    """
    at = dict(zip(etas, changes, strict=True))
    return [
        EtaPair(eta, at[eta].minus(at[-eta]).scaled(0.5), at[eta].minus(at[-eta].scaled(-1.0)).scaled(0.5))
        for eta in at
        if eta > 0 and -eta in at
    ]
