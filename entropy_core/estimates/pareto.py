"""Pareto k̂ of importance weights: how heavy their tail is. The only importer of arviz-stats.

Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", JMLR 25(72), 2024: a mean of N weights is
practically useful while k̂ < min(1 − 1/log₁₀ N, 0.7).
"""

import math

import numpy as np
from arviz_stats.base import array_stats
from torch import Tensor

FEWEST = 25  # with fewer weights the tail, a fifth of them, has under five values and no fit


def pareto_k(weights_N: Tensor) -> float | None:
    """Shape of a generalised Pareto distribution fitted to the largest weights.

    Args:
        weights_N: importance weights, positive, any scale, float64 [N].

    Returns:
        k̂; None when there are too few weights, or the tail has no spread (equal weights).
    """
    if len(weights_N) < FEWEST:
        return None
    log_weights = np.log(weights_N.numpy())
    tail = np.sort(log_weights)[-math.ceil(min(0.2 * len(log_weights), 3 * math.sqrt(len(log_weights)))) :]
    if tail[-1] - tail[0] < 1e-12:  # the library refuses equal tail values
        return None
    _, k = array_stats.psislw(-log_weights)  # it wants them negated
    return float(k)


def threshold(N: int) -> float:
    """Largest k̂ at which a mean of N weights can be trusted."""
    return min(1 - 1 / math.log10(N), 0.7) if N > 1 else 0.0
