"""Rows of the result table, one per step size and estimator: prediction δH₁, measured change ΔH, and verdicts.

θ are the checkpoint's parameters, v is the step per unit of learning rate, η the step size; E is the evaluation batch
and U the update batch. δH₁ and ΔH have three confidence intervals each, see `estimates.intervals`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.estimates import distributions, pareto
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.intervals import Randomness, intervals, widened
from entropy_core.estimates.measurement import Measured
from entropy_core.numerics import half_samples, importance, path_integral, uncertainty, verdicts
from entropy_core.numerics.choices import Estimator, Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.half_samples import HalfSteps, OverU
from entropy_core.numerics.uncertainty import Estimate

Row = dict[str, Any]


class Contributions(NamedTuple):
    """What the randomness of U does to ∂_vH, from first-order-u and half-steps-u.

    Args:
        whole_PG: influence of each U sequence on ∂_vH, nats per unit step, with ∇H from all of E, float64 [P, G].
        halves_2PG: the same with ∇H from each half of E, float64 [2, P, G].
        steps: the steps on halves of U.
        informative: number of prompts whose responses have unequal rewards.
    """

    whole_PG: Tensor
    halves_2PG: Tensor
    steps: HalfSteps
    informative: int


class Derivative(NamedTuple):
    """∂_vH for one normalisation, its standard errors, and whether intervals are valid; nats per unit step.

    Args:
        estimate: ∂_vH, with the influence of each sequence of E.
        of_estimator: by estimator of ΔH, its exact derivative at η = 0 on the same E.
        local: part of ∂_vH at fixed prefixes: the mean of Σ_k ḣ_k, per token divided by the mean length.
        jackknife: standard error over E, by the jackknife.
        se_given_u: standard error over E, by the influences.
        linearised: standard error over U if the step were linear in the gradient.
        over_u: standard error over U that the intervals use.
        nonlinearity: of the step in the gradient, dimensionless; see `HalfSteps`.
        informative: prompts of U whose responses have unequal rewards.
        units_e: independent units of E.
        invalid_over_e: why no interval over E is valid; empty if they are.
        numerical: standard deviation of the error of its computation, which a larger E does not reduce.
    """

    estimate: Estimate
    of_estimator: dict[Estimator, Estimate]
    local: float
    jackknife: float
    se_given_u: float
    linearised: float
    over_u: OverU
    nonlinearity: float
    informative: int
    units_e: int
    invalid_over_e: str
    numerical: float = 0.0

    @property
    def randomness(self) -> Randomness:
        """What the intervals of a change take from ∂_vH."""
        return Randomness(self.units_e, self.over_u, self.invalid_over_e)


def derivative_of(
    batch: EvaluationBatch,
    normalization: Normalization,
    contributions: Contributions,
    invalid_over_e: str = "",
    numerical: float = 0.0,
) -> Derivative:
    """Estimate ∂_vH with its standard errors over E and over U.

    Args:
        batch: E.
        normalization: per sequence or per token.
        contributions: influence of each sequence of U on ∂_vH.
        invalid_over_e: why no interval over E is valid; empty if they are.
        numerical: standard deviation of the error of its computation, nats per unit step.

    Returns:
        The estimate and its standard errors, in nats per unit step.
    """
    columns, (whole_PG, halves_2PG, steps, informative) = batch.columns, contributions
    estimate = uncertainty.entropy_derivative(columns, normalization)
    linearised = uncertainty.clustered_sum_standard_error(whole_PG)
    interaction = uncertainty.interaction_variance(whole_PG.sum(1), halves_2PG.sum(2))
    mean_length = float(columns[LENGTH].total_N.mean()) if normalization == "per_token" else 1.0
    return Derivative(
        estimate=estimate,
        of_estimator={
            "per_decision": estimate,
            "weighted_per_decision": uncertainty.entropy_derivative(batch.weighted_columns, normalization),
            "snis": uncertainty.snis_derivative(
                batch.unweighted_columns, batch.score_N, normalization, batch.sampling.weights_N
            ),
            "path_integral": estimate,
        },
        local=float(columns[ENTROPY].local_N.mean()) / mean_length,
        jackknife=uncertainty.jackknife_standard_error(columns, normalization, batch.clusters_N),
        se_given_u=batch.standard_error(estimate),
        linearised=linearised,
        over_u=half_samples.over_u(linearised, interaction, steps, len(whole_PG), informative),
        nonlinearity=steps.nonlinearity,
        informative=informative,
        units_e=batch.units,
        invalid_over_e=invalid_over_e,
        numerical=numerical,
    )


def predict(derivative: Derivative, eta: float, confidence_level: float) -> Row:
    """Compute δH₁ = η·∂_vH with its standard errors and intervals.

    Args:
        derivative: ∂_vH from `derivative_of`.
        eta: absolute step size.
        confidence_level: confidence level of the intervals, which use t quantiles.

    Returns:
        Columns of `estimate_columns.ESTIMATES`, in nats.
    """
    delta_h1, over_u = derivative.estimate.value * eta, derivative.over_u
    invalid = derivative.invalid_over_e
    of_e = math.hypot(derivative.se_given_u, derivative.numerical) * abs(eta)
    has_nonlinearity = over_u.degrees_of_freedom > 0 and math.isfinite(derivative.nonlinearity)
    return {
        "delta_h1": delta_h1,
        "delta_h1_local": derivative.local * eta,
        "se_given_u": derivative.se_given_u * abs(eta),
        "se_given_u_jackknife": derivative.jackknife * abs(eta),
        "se_over_u": over_u.standard_error * abs(eta),
        "se_over_u_linearised": derivative.linearised * abs(eta),
        "se_interaction": over_u.interaction**0.5 * abs(eta),
        "nonlinearity_over_u": derivative.nonlinearity if has_nonlinearity else None,
        "informative_prompts_u": derivative.informative,
        "interval_over_e": f"no valid interval over E: {invalid}" if invalid else "valid",
        "interval_over_u": f"no valid interval over U: {over_u.invalid}" if over_u.invalid else "valid",
        **intervals("", delta_h1, of_e, derivative.randomness, eta, confidence_level)[0],
        "confidence_level": confidence_level,
    }


class Reliability(NamedTuple):
    """Whether importance weights can be trusted: effective sample size, Pareto k̂ and its threshold, and the answer."""

    ess: float
    pareto_k: float | None
    threshold: float
    reliable: bool


def reliability(terms: Measured, sequences: int, eta: float) -> Reliability:
    """Judge the weights of an estimator of ΔH.

    Args:
        terms: with the weights.
        sequences: N, size of E.
        eta: absolute step size.

    Returns:
        The answer, and what it is from.
    """
    ess = importance.effective_sample_size(terms.weights_N) if terms.usable else 0.0
    k, threshold = pareto.pareto_k(terms.weights_N) if terms.usable and eta else None, pareto.threshold(sequences)
    return Reliability(ess, k, threshold, terms.usable and verdicts.weights_reliable(ess / sequences, k, threshold))


def change_of(
    batch: EvaluationBatch, moved_terms: Measured, eta: float, estimator: Estimator, normalization: Normalization
) -> Estimate:
    """Estimate ΔH between θ and θ + ηv, paired on the sequences of E.

    Args:
        batch: E at θ.
        moved_terms: `measurement.measured` with the same estimator; for η = 0 the change is exactly 0.
        eta: absolute step size.
        estimator: estimator of ΔH.
        normalization: per sequence or per token.

    Returns:
        ΔH in nats per sequence or per token.
    """
    if moved_terms.columns is None:
        return Estimate(0.0, torch.zeros(len(batch), dtype=torch.float64))
    if isinstance(moved_terms.columns, tuple):
        return path_integral.entropy_change(moved_terms.columns, eta, normalization)

    def entropy(weights_N: Tensor, S_N: Tensor, T_N: Tensor) -> Estimate:
        if estimator == "snis":
            return uncertainty.snis_entropy(weights_N, S_N, T_N, normalization)
        return uncertainty.entropy(S_N, T_N, normalization)

    at_theta = batch.value_columns(estimator)
    before = entropy(batch.sampling.weights_N, *(at_theta[functional].total_N for functional in (ENTROPY, LENGTH)))
    after = entropy(moved_terms.weights_N, *(moved_terms.columns[functional] for functional in (ENTROPY, LENGTH)))
    return after.minus(before)


def measure(
    batch: EvaluationBatch,
    change: Estimate,
    moved_terms: Measured,
    derivative: Derivative,
    eta: float,
    estimator: Estimator,
    noise_floor: float,
    confidence_level: float,
) -> Row:
    """Compute the columns of a measured change: ΔH, its difference from δH₁, its intervals, and the verdicts.

    Rounding errors are those of one draw for the whole batch, so their variance, (noise floor/2)², is added to that of
    every change measured, and that of the derivative to the variance of every difference from it.

    Args:
        batch: E.
        change: ΔH from `change_of`.
        moved_terms: the terms that `change` was computed from.
        derivative: ∂_vH from `derivative_of`.
        eta: absolute step size.
        estimator: estimator of ΔH.
        noise_floor: twice the rms of the numerical noise of ΔH, nats.
        confidence_level: confidence level of the intervals, which use t quantiles.

    Returns:
        Columns of `estimate_columns.ESTIMATES`; the measured columns are None if weights overflowed.
    """
    usable, N = moved_terms.usable, len(batch)
    ess, k, k_threshold, reliable = reliability(moved_terms, N, eta)
    quantile = distributions.t_quantile(0.5 + confidence_level / 2, derivative.units_e - 1)

    def error(estimate: Estimate) -> float:
        return math.hypot(batch.standard_error(estimate), noise_floor / 2)

    def error_from_line(estimate: Estimate) -> float:
        return math.hypot(error(estimate), derivative.numerical * eta)

    prediction = derivative.estimate.scaled(eta)
    difference = change.minus(prediction)
    of_same = derivative.of_estimator[estimator].scaled(eta)
    curvature = change.minus(of_same)
    widen = widened(prediction.value, curvature.value) if reliable else math.inf
    ends, p_values = intervals(
        "delta_h_", change.value, error(change), derivative.randomness, eta, confidence_level, widen
    )
    measured = {
        "delta_h": change.value,
        "delta_h_se": error(change),
        **ends,
        "curvature": curvature.value,
        "curvature_se": error_from_line(curvature),
        "paired_difference": difference.value,
        "paired_difference_se": error_from_line(difference),
        "minimum_detectable": (quantile + uncertainty.POWER_QUANTILE) * error(change),
        **{f"p_{name}": p_values[name] for name in ("this_update", "mean_update")},
    }
    if not usable:
        measured = dict.fromkeys(measured)  # weights overflowed
    signs = {
        f"sign_{name}": verdicts.sign(measured[f"delta_h_{name}_low"], measured[f"delta_h_{name}_high"])
        for name in p_values
    }
    if not reliable:
        signs = dict.fromkeys(signs, "unknown")
    above, below = verdicts.bounds(curvature, of_same)  # curvature − m and curvature + m, with m = 5 % of |δH₁|
    shape: verdicts.Linearity = "undecided"
    if reliable and eta and not derivative.invalid_over_e:
        shape = verdicts.linearity(above.value, error_from_line(above), below.value, error_from_line(below), quantile)
    above_rounding = usable and abs(change.value) > noise_floor
    word, rule = verdicts.verdict(
        eta=eta,
        weights_reliable=reliable,
        above_rounding=above_rounding,
        sign_this_update=signs["sign_this_update"],
        linearity=shape,
        invalid_over_e=derivative.invalid_over_e,
    )
    return {
        **measured,
        "ess": ess,
        "ess_fraction": ess / N,
        "ess_prefix": moved_terms.ess_prefix,
        "pareto_k": k,
        "pareto_k_threshold": k_threshold,
        **signs,
        "linearity": shape,
        "above_rounding": above_rounding,
        "weights_reliable": reliable,
        "verdict": word,
        "rule": rule,
    }
