"""Pareto k̂ of importance weights, a measure of how heavy their tail is. The only importer of arviz-stats.

Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", JMLR 25(72), 2024: a mean of N weights is
practically useful if k̂ < min(1 − 1/log₁₀ N, 0.7).
"""

import math

import numpy as np
from arviz_stats.base import array_stats
from torch import Tensor

FEWEST = 25  # with fewer weights the tail, a fifth of them, has fewer than five values and cannot be fitted


def pareto_k(weights_N: Tensor) -> float | None:
    """Fit a generalised Pareto distribution to the largest weights and return its shape.

    Args:
        weights_N: importance weights, positive, any scale, float64 [N].

    Returns:
        k̂; None if there are too few weights, or if the weights in the tail are equal.
    """
    if len(weights_N) < FEWEST:
        return None
    log_weights = np.log(weights_N.numpy())
    count = math.floor(min(0.2 * len(log_weights), 3 * math.sqrt(len(log_weights))))
    below, *tail = np.sort(log_weights)[-count - 1 :]
    quartile = tail[int(count / 4 + 0.5) - 1]  # the library divides by its distance to the value below the tail
    if tail[-1] - tail[0] < 1e-12 or quartile - below < 1e-12:
        return None
    _, k = array_stats.psislw(-log_weights)  # psislw expects negated log weights
    return float(k)


def threshold(N: int) -> float:
    """Return the largest k̂ at which a mean of N weights can be trusted."""
    return min(1 - 1 / math.log10(N), 0.7) if N > 1 else 0.0
