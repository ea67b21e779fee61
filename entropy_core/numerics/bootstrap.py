"""Bootstrap intervals of ∂_vH, the derivative of the entropy along the step v: independent units are resampled.

The estimate is a function of sums over units (sequences or clusters of sequences). A resample is therefore a vector of
counts, and all resamples are one matrix product of counts and per-unit sums. Percentile and BCa intervals follow Efron
and Tibshirani (1993), An Introduction to the Bootstrap, chapters 13 and 14.
"""

from collections.abc import Mapping
from math import nan
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns, Functional, ratio_slope
from entropy_core.numerics.uncertainty import cluster_sums

CHUNK_COUNTS = 1 << 18  # counts in memory at a time; does not change the result


class BootstrapIntervals(NamedTuple):
    """Ends of the percentile and BCa intervals, and standard deviation over the resamples, in nats per unit step."""

    percentile_low: float
    percentile_high: float
    bca_low: float
    bca_high: float
    standard_error: float


def intervals(
    columns: Mapping[Functional, Columns],
    normalization: Normalization,
    confidence_level: float,
    resamples: int,
    clusters_N: Tensor | None = None,
    seed: int = 0,
) -> BootstrapIntervals:
    """Compute percentile and BCa intervals of `uncertainty.entropy_derivative`.

    BCa shifts the percentiles by the median bias z₀ of the resamples and by the acceleration a, the skewness of the
    delete-one-unit jackknife over 6: α ↦ Φ(z₀ + (z₀ + z_α)/(1 − a(z₀ + z_α))).

    Args:
        columns: `first_order.first_order_columns` of entropy and length; their baselines are not recomputed.
        normalization: per sequence or per token.
        confidence_level: confidence level, between 0 and 1.
        resamples: number of resamples, at least 2.
        clusters_N: int64 [N], cluster of each sequence; None to resample single sequences.
        seed: random seed; equal seeds give equal intervals.

    Returns:
        The intervals; NaN for fewer than two units.
    """
    (S_N, x_N, _), (T_N, y_N, _) = columns[ENTROPY], columns[LENGTH]
    per_sequence_N5 = torch.stack([x_N, y_N, S_N, T_N, torch.ones_like(x_N)], dim=1)
    sums_U5 = cluster_sums(per_sequence_N5, clusters_N)
    if len(sums_U5) < 2:
        return BootstrapIntervals(nan, nan, nan, nan, nan)
    total_5 = sums_U5.sum(0)
    values_R = _derivative(_resampled_sums(sums_U5, resamples, seed), normalization)
    without_U = _derivative(total_5 - sums_U5, normalization)
    tail = (1 - confidence_level) / 2
    z0 = _median_bias(values_R, _derivative(total_5, normalization))
    levels = [tail, 1 - tail, *(_shifted(level, z0, _acceleration(without_U)) for level in (tail, 1 - tail))]
    low, high, bca_low, bca_high = values_R.quantile(torch.tensor(levels, dtype=torch.float64)).tolist()
    return BootstrapIntervals(low, high, bca_low, bca_high, float(values_R.std()))


def _derivative(sums_5: Tensor, normalization: Normalization) -> Tensor:
    """Compute ∂_vH from sums of x, y, S, T and 1 in the last dimension."""
    x, y, S, T, count = sums_5.unbind(-1)
    return x / count if normalization == "per_sequence" else ratio_slope(x, y, S / T, T)


def _resampled_sums(sums_U5: Tensor, resamples: int, seed: int) -> Tensor:
    """Return sums over U units drawn with replacement from U units: float64 [resamples, 5]."""
    U, generator = len(sums_U5), torch.Generator().manual_seed(seed)
    chunks = []
    for rows in torch.arange(resamples).split(max(1, CHUNK_COUNTS // U)):
        drawn_RU = torch.randint(U, (len(rows), U), generator=generator)
        # an offset of U per resample lets one bincount count the draws of all resamples
        drawn_RU += U * torch.arange(len(rows)).unsqueeze(1)
        counts_RU = drawn_RU.flatten().bincount(minlength=len(rows) * U).view(len(rows), U)
        chunks.append(counts_RU.double() @ sums_U5)
    return torch.cat(chunks)


def _median_bias(values_R: Tensor, value: Tensor) -> float:
    """Return z₀ = Φ⁻¹(share of resamples below the estimate), where ties count half."""
    below = float((values_R < value).double().mean() + (values_R <= value).double().mean()) / 2
    half = 0.5 / len(values_R)  # if all are on one side: the most extreme share that this many resamples resolve
    return NormalDist().inv_cdf(min(max(below, half), 1 - half))


def _acceleration(without_U: Tensor) -> float:
    influence_U = without_U.mean() - without_U
    square = float((influence_U**2).sum())
    return float((influence_U**3).sum()) / (6 * square**1.5) if square > 0 else 0.0


def _shifted(level: float, z0: float, acceleration: float) -> float:
    reach = z0 + NormalDist().inv_cdf(level)
    if acceleration * reach >= 1:  # beyond the pole of the formula: use the outermost resample
        return float(reach > 0)
    return NormalDist().cdf(z0 + reach / (1 - acceleration * reach))
