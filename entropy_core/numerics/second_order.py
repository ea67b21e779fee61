"""The second derivative of the entropy along the step, from changes at a few step sizes or slopes on the way.

v is the step per unit of learning rate and ∂_v the derivative along it at the checkpoint's parameters θ. With Taylor
coefficients a_q = ∂_v^qH/q!, a change and a slope divided by powers of η are

    (ΔH(η) − η∂_vH)/η²                  = a₂ + a₃η + a₄η² + …
    (∂_vH at θ + ηv − ∂_vH at θ)/(2η)   = a₂ + (3/2)a₃η + (4/2)a₄η² + …

Each is an estimate of a₂ = ½∂²_vH with two errors that do not average out over E: rounding, which grows as η falls, and
the orders above the second, which grow with η. A weighted mean makes both small together. Sampling noise plays no part
in the weights: to lowest order it is the same in all of them, because they share E.

How fast the orders fall is known from the importance weights. Let x be their relative standard deviation at η, with the
sign of η. Then a_{2+p}η^p is taken to be of the size of a₂x^p, with an unknown sign: in the weights and in the standard
error the a_{2+p} are independent, with mean 0 and that standard deviation.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.uncertainty import Estimate

ORDERS = 8
"""How many orders above the second are reckoned with."""


class Observation(NamedTuple):
    """An estimate of ½∂²_vH from one step size.

    Args:
        coefficient: the estimate, nats per squared unit of η.
        rounding: standard deviation of its rounding error.
        higher_P: a_{2+p}·η^p relative to a₂ at p = 1 … `ORDERS`, up to an unknown sign, float64 [P].
        spread_per_step: |x/η|, the factor by which each further derivative along v grows.
    """

    coefficient: Estimate
    rounding: float
    higher_P: Tensor
    spread_per_step: float


class SecondOrder(NamedTuple):
    """½∂²_vH in nats per squared unit of η.

    Args:
        coefficient: the estimate, with its influence on E.
        rounding: standard deviation of its rounding error.
        truncation: the same of the orders above the second.
        points: number of observations.
    """

    coefficient: Estimate
    rounding: float
    truncation: float
    points: int

    @property
    def fixed(self) -> float:
        """Standard deviation of what does not average out over E: rounding and the orders above the second."""
        return math.hypot(self.rounding, self.truncation)


def spread(effective_fraction: float, eta: float) -> float:
    """Return x, the relative standard deviation of the importance weights, with the sign of η.

    Args:
        effective_fraction: their effective sample size as a fraction of all, ESS/N = 1/(1 + x²).
        eta: step size.

    Returns:
        x.
    """
    return math.copysign(math.sqrt(max(1 / effective_fraction - 1, 0.0)), eta)


def of_change(change: Estimate, derivative: Estimate, eta: float, x: float, rounding: float) -> Observation:
    """Estimate ½∂²_vH from a change.

    Args:
        change: ΔH(η), nats.
        derivative: ∂_vH at θ on the same batch, by the estimator that measured ΔH.
        eta: η, not 0.
        x: `spread` at η.
        rounding: standard deviation of the rounding error of ΔH.

    Returns:
        (ΔH − η∂_vH)/η².
    """
    higher_P = x ** torch.arange(1, ORDERS + 1, dtype=torch.float64)
    return Observation(change.minus(derivative.scaled(eta)).scaled(eta**-2), rounding / eta**2, higher_P, abs(x / eta))


def of_slope(slope: Estimate, derivative: Estimate, eta: float, x: float, rounding: float) -> Observation:
    """Estimate ½∂²_vH from a derivative at another point of the step.

    Rounding changes a derivative along v as much as it changes H, times |x/η|.

    Args:
        slope: ∂_vH at θ + ηv, nats per unit of η.
        derivative: ∂_vH at θ on the same batch.
        eta: η, not 0.
        x: `spread` at η.
        rounding: standard deviation of the rounding error of H(θ + ηv), nats.

    Returns:
        (slope − derivative)/(2η).
    """
    orders_P = torch.arange(1, ORDERS + 1, dtype=torch.float64)
    coefficient = slope.minus(derivative).scaled(1 / (2 * eta))
    of_rounding = rounding * abs(x) / (2 * eta**2)
    return Observation(coefficient, of_rounding, (1 + orders_P / 2) * x**orders_P, abs(x / eta))


def combine(observations: Sequence[Observation], derivative: float) -> SecondOrder:
    """Combine observations with the weights, summing to 1, for which rounding and higher orders have least variance.

    Args:
        observations: at least one, all on the same batch.
        derivative: ∂_vH at θ. The size of the higher orders goes by |a₂|, or by |∂_vH·x/η| if that is larger.

    Returns:
        The weighted mean. Its influence is that of fixed weights.

    Raises:
        ValueError: there is no observation.
    """
    if not observations:
        raise ValueError("a second derivative needs a step size")
    rounding_J = torch.tensor([one.rounding for one in observations], dtype=torch.float64)
    higher_JP = torch.stack([one.higher_P for one in observations])
    value_J = torch.tensor([one.coefficient.value for one in observations], dtype=torch.float64)
    size = abs(derivative) * median(one.spread_per_step for one in observations)
    error_J = rounding_J**2 + (size * higher_JP.norm(dim=1)) ** 2
    size = max(size, float(value_J[error_J.argmin()].abs()))
    covariance_JJ = torch.diag(rounding_J**2) + size**2 * higher_JP @ higher_JP.T
    weights_J = _least_variance(covariance_JJ)
    influence_N = sum(weight * one.coefficient.influence_N for weight, one in zip(weights_J, observations, strict=True))
    assert isinstance(influence_N, Tensor)
    return SecondOrder(
        Estimate(float(weights_J @ value_J), influence_N),
        float((weights_J * rounding_J).norm()),
        size * float((weights_J @ higher_JP).norm()),
        len(observations),
    )


def _least_variance(covariance_JJ: Tensor) -> Tensor:
    """Return the weights Σ⁻¹1/(1ᵀΣ⁻¹1), [J]; equal ones if Σ = 0."""
    deviation_J = covariance_JJ.diagonal().sqrt()
    if not deviation_J.any():
        return torch.full_like(deviation_J, 1 / len(deviation_J))
    deviation_J = deviation_J.clamp_min(1e-12 * float(deviation_J.max()))
    correlation_JJ = covariance_JJ / (deviation_J.unsqueeze(1) * deviation_J)
    # what float64 adds to every number; without it, steps of one size would make Σ singular
    correlation_JJ += 1e-13 * torch.eye(len(deviation_J), dtype=torch.float64)
    weights_J = torch.linalg.solve(correlation_JJ, 1 / deviation_J) / deviation_J
    return weights_J / weights_J.sum()
