"""Pareto k̂ of importance weights, a measure of how heavy their tail is.

Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", JMLR 25(72), 2024: a mean of N weights is
practically useful if k̂ < min(1 − 1/log₁₀ N, 0.7). The fit is that of Zhang and Stephens, "A new and efficient
estimation method for the generalized Pareto distribution", Technometrics 51(3), 2009, with the prior on k that the
first paper adds. arviz-stats has the same fit, but takes as long to import as the statistics take to compute.
"""

import math

import torch
from torch import Tensor

FEWEST = 25  # with fewer weights the tail, a fifth of them, has fewer than five values and cannot be fitted
PRIOR_K, PRIOR_WEIGHT = 0.5, 10  # the prior counts as this many weights with k = 1/2


def pareto_k(weights_N: Tensor) -> float | None:
    """Fit a generalised Pareto distribution to the largest weights and return its shape.

    Args:
        weights_N: importance weights, positive, any scale, float64 [N].

    Returns:
        k̂; None if there are too few weights, or if the weights in the tail are equal.
    """
    N = len(weights_N)
    if N < FEWEST:
        return None
    count = math.floor(min(0.2 * N, 3 * math.sqrt(N)))
    log_weights_N = weights_N.log()
    largest = (log_weights_N - log_weights_N.max()).sort().values[-count - 1 :]
    below, tail_M = largest[0], largest[1:]
    if tail_M[-1] - tail_M[0] < 1e-12 or tail_M[_quartile(count)] - below < 1e-12:  # ties cannot be fitted
        return None
    return _shape(tail_M.exp() - below.exp())


def threshold(N: int) -> float:
    """Return the largest k̂ at which a mean of N weights can be trusted."""
    return min(1 - 1 / math.log10(N), 0.7) if N > 1 else 0.0


def _quartile(M: int) -> int:
    """Return the index of the lower quartile of M ascending values."""
    return math.floor(M / 4 + 0.5) - 1


def _shape(excess_M: Tensor) -> float:
    """Estimate the shape k of a generalised Pareto distribution.

    With θ = −k/σ the likelihood is largest at k(θ) = mean log(1 − θx). θ is the mean of a grid of values, weighted by
    their likelihood.

    Args:
        excess_M: distances of the largest values from the one below them, ascending, positive, float64 [M].

    Returns:
        The posterior mean of k.
    """
    M = len(excess_M)
    grid = 30 + math.floor(math.sqrt(M))
    steps_G = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    quartile = excess_M[_quartile(M)]
    theta_G = 1 / excess_M[-1] + (1 - (grid / steps_G).sqrt()) / (3 * quartile)
    k_G = torch.log1p(-theta_G[:, None] * excess_M).mean(1)
    log_likelihood_G = M * ((-theta_G / k_G).log() - k_G - 1)
    theta = (log_likelihood_G.softmax(0) * theta_G).sum()
    k = torch.log1p(-theta * excess_M).mean()
    return float((M * k + PRIOR_WEIGHT * PRIOR_K) / (M + PRIOR_WEIGHT))
