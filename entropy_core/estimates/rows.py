"""Rows of the result table from the columns of the evaluation batch E: prediction, measurement, verdict.

θ are the checkpoint's parameters, v is the step per unit of learning rate, η the step size, and U the update batch.
"""

from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from entropy_core.estimates import pareto
from entropy_core.estimates.evaluation import EvaluationBatch, Measured
from entropy_core.numerics import bootstrap, importance, path_integral, uncertainty
from entropy_core.numerics.bootstrap import BootstrapIntervals
from entropy_core.numerics.choices import Estimator, Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.numerics.verdicts import verdict

Row = dict[str, Any]

POWER_QUANTILE = uncertainty.normal_quantile(0.6)  # a change of (z + 0.84) SE is detected with probability 80 %


class Contributions(NamedTuple):
    """Influence of each U sequence on ∂_vH, with ∇H from all of E, float64 [P, G], and from each half, [2, P, G]."""

    whole_PG: Tensor
    halves_2PG: Tensor


class Derivative(NamedTuple):
    """∂_vH for one normalisation with its standard errors, all in nats per unit step."""

    estimate: Estimate
    of_estimator: dict[Estimator, Estimate]  # the exact derivative of each ΔH estimator at η = 0
    local: float
    jackknife: float
    bootstrap: BootstrapIntervals
    se_given_u: float
    se_over_u: float
    interaction: float
    units_e: int
    prompts_u: int


def derivative_of(
    batch: EvaluationBatch,
    normalization: Normalization,
    contributions: Contributions,
    confidence_level: float,
    resamples: int,
) -> Derivative:
    """Estimate ∂_vH with its standard errors over E and over U.

    Args:
        batch: E.
        normalization: per sequence or per token.
        contributions: influence of each sequence of U on ∂_vH.
        confidence_level: confidence level of the bootstrap intervals.
        resamples: number of bootstrap resamples.

    Returns:
        The estimate and its standard errors, in nats per unit step.
    """
    columns = batch.columns
    estimate = uncertainty.entropy_derivative(columns, normalization)
    mean_length = float(columns[LENGTH].total_N.mean()) if normalization == "per_token" else 1.0
    return Derivative(
        estimate=estimate,
        of_estimator={
            "per_decision": estimate,
            "weighted_per_decision": uncertainty.entropy_derivative(batch.weighted_columns, normalization),
            "snis": uncertainty.snis_derivative(columns, batch.score_N, normalization),
            "path_integral": estimate,
        },
        local=float(columns[ENTROPY].local_N.mean()) / mean_length,
        jackknife=uncertainty.jackknife_standard_error(columns, normalization, batch.clusters_N),
        bootstrap=bootstrap.intervals(columns, normalization, confidence_level, resamples, batch.clusters_N),
        se_given_u=batch.standard_error(estimate),
        se_over_u=uncertainty.clustered_sum_standard_error(contributions.whole_PG),
        interaction=uncertainty.interaction_variance(contributions.whole_PG.sum(1), contributions.halves_2PG.sum(2)),
        units_e=batch.units,
        prompts_u=len(contributions.whole_PG),
    )


def predict(derivative: Derivative, eta: float, confidence_level: float) -> Row:
    """Compute δH₁ = η·∂_vH with its standard errors and intervals.

    Args:
        derivative: ∂_vH from `derivative_of`.
        eta: absolute step size.
        confidence_level: confidence level of the intervals, which use t quantiles.

    Returns:
        Columns of `tables.ESTIMATES`, in nats.
    """
    total = uncertainty.total_standard_error(
        derivative.se_given_u, derivative.units_e, derivative.se_over_u, derivative.prompts_u, derivative.interaction
    )
    delta_h1 = derivative.estimate.value * eta
    tail = 0.5 + confidence_level / 2
    half_total = float(student.ppf(tail, total.degrees_of_freedom)) * total.standard_error * abs(eta)
    half_given_u = float(student.ppf(tail, derivative.units_e - 1)) * derivative.se_given_u * abs(eta)
    ends = derivative.bootstrap
    percentile, bca = (sorted(eta * end for end in pair) for pair in (ends[:2], ends[2:4]))
    return {
        "delta_h1": delta_h1,
        "delta_h1_local": derivative.local * eta,
        "se_given_u": derivative.se_given_u * abs(eta),
        "se_given_u_jackknife": derivative.jackknife * abs(eta),
        "se_over_u": derivative.se_over_u * abs(eta),
        "se_interaction": derivative.interaction**0.5 * abs(eta),
        "se_total": total.standard_error * abs(eta),
        "ci_low": delta_h1 - half_total,
        "ci_high": delta_h1 + half_total,
        "ci_given_u_low": delta_h1 - half_given_u,
        "ci_given_u_high": delta_h1 + half_given_u,
        "percentile_low": percentile[0],
        "percentile_high": percentile[1],
        "bca_low": bca[0],
        "bca_high": bca[1],
        "confidence_level": confidence_level,
    }


def change_of(
    batch: EvaluationBatch, moved_terms: Measured, eta: float, estimator: Estimator, normalization: Normalization
) -> Estimate:
    """Estimate ΔH between θ and θ + ηv, paired on the sequences of E.

    Args:
        batch: E at θ.
        moved_terms: `evaluation.measured` with the same estimator; for η = 0 the change is exactly 0.
        eta: absolute step size.
        estimator: estimator of ΔH.
        normalization: per sequence or per token.

    Returns:
        ΔH in nats per sequence or per token.
    """
    S_N, T_N = (batch.columns[functional].total_N for functional in (ENTROPY, LENGTH))
    if moved_terms.columns is None:
        return Estimate(0.0, torch.zeros_like(S_N))
    if isinstance(moved_terms.columns, tuple):
        return path_integral.entropy_change(moved_terms.columns, eta, normalization)
    moved_S_N, moved_T_N = (moved_terms.columns[functional] for functional in (ENTROPY, LENGTH))
    if estimator == "snis":
        moved = uncertainty.snis_entropy(moved_terms.weights_N, moved_S_N, moved_T_N, normalization)
    else:
        moved = uncertainty.entropy(moved_S_N, moved_T_N, normalization)
    return moved.minus(uncertainty.entropy(S_N, T_N, normalization))


def measure(
    batch: EvaluationBatch,
    change: Estimate,
    moved_terms: Measured,
    derivative: Derivative,
    eta: float,
    estimator: Estimator,
    noise_floor: float,
    quantile: float,
) -> Row:
    """Compute the columns of a measured change: ΔH, its difference from δH₁, effective sample sizes, and the verdict.

    Args:
        batch: E.
        change: ΔH from `change_of`.
        moved_terms: the terms that `change` was computed from.
        derivative: ∂_vH from `derivative_of`.
        eta: absolute step size.
        estimator: estimator of ΔH.
        noise_floor: numerical noise of ΔH, nats.
        quantile: normal quantile of the confidence level.

    Returns:
        Columns of `tables.ESTIMATES`; the measured columns are None if weights overflowed.
    """
    usable = moved_terms.usable
    ess = importance.effective_sample_size(moved_terms.weights_N) if usable else 0.0
    prediction = derivative.estimate.scaled(eta)
    difference = change.minus(prediction)
    curvature = change.minus(derivative.of_estimator[estimator].scaled(eta))
    measured = {
        "delta_h": change.value,
        "delta_h_se": batch.standard_error(change),
        "curvature": curvature.value,
        "curvature_se": batch.standard_error(curvature),
    }
    N = len(batch)
    k, k_threshold = pareto.pareto_k(moved_terms.weights_N) if usable and eta else None, pareto.threshold(N)
    word, rule = verdict(
        eta=eta,
        delta_h1=prediction.value,
        noise_floor=noise_floor,
        quantile=quantile,
        ess_fraction=ess / N,
        pareto_k=k,
        pareto_k_threshold=k_threshold,
        **measured,
    )
    measured |= {"paired_difference": difference.value, "paired_difference_se": batch.standard_error(difference)}
    return {
        **(measured if usable else dict.fromkeys(measured)),  # null if weights overflowed
        "minimum_detectable": (quantile + POWER_QUANTILE) * measured["delta_h_se"] + noise_floor if usable else None,
        "ess": ess,
        "ess_fraction": ess / N,
        "ess_prefix": moved_terms.ess_prefix,
        "pareto_k": k,
        "pareto_k_threshold": k_threshold,
        "verdict": word,
        "rule": rule,
    }
