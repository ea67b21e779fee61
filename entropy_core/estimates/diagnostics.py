"""Diagnostics of a checkpoint's estimates: numerical noise, tails, linearity, replicates, predictors.

ℓ is the log-probability of a token and h its entropy, in nats; A is the advantage of its response; v is the step per
unit of learning rate.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_core.estimates.distributions import chi_squared_tail
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured
from entropy_core.estimates.rows import Derivative, Row, change_of
from entropy_core.numerics import linearity, predictors, ragged, uncertainty
from entropy_core.numerics.choices import Estimator, Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.uncertainty import Estimate


def numerical_noise(batch: EvaluationBatch, rescored: Sequence[Measured], normalization: Normalization) -> float:
    """Compute twice the root mean square of the ΔH that rounding alone produces.

    Args:
        batch: the sequences of E that were rescored.
        rescored: of `batches.rescored_batch`.
        normalization: per sequence or per token.

    Returns:
        The noise floor, nats.
    """
    return twice_rms([change_of(batch, terms, 1.0, "per_decision", normalization).value for terms in rescored])


def twice_rms(changes: Sequence[float]) -> float:
    """Return twice the root mean square."""
    return 2.0 * (sum(change**2 for change in changes) / len(changes)) ** 0.5


def describe_batch(batch: EvaluationBatch, normalization: Normalization) -> Row:
    """Compute entropy and length of the policy on E.

    Args:
        batch: E.
        normalization: per sequence or per token.

    Returns:
        Columns of `estimate_columns.ESTIMATES`.
    """
    S_N, T_N = (batch.columns[functional].total_N for functional in (ENTROPY, LENGTH))
    H = uncertainty.entropy(S_N, T_N, normalization)
    return {"H": H.value, "H_se": batch.standard_error(H), "mean_length": float(T_N.mean())}


def describe_influence(estimate: Estimate) -> Row:
    """Measure how heavy the tails of an estimate's influence values are.

    Args:
        estimate: estimate of ∂_vH.

    Returns:
        Columns of `estimate_columns.ESTIMATES`.
    """
    squares_N = estimate.influence_N**2
    total = float(squares_N.sum())
    return {
        "excess_kurtosis": uncertainty.excess_kurtosis(estimate.influence_N),
        "largest_influence": float(squares_N.max()) / total if total else 0.0,
    }


def linearity_rows(
    batch: EvaluationBatch,
    at_eta: Mapping[float, tuple[Estimate, float]],
    derivative: Derivative,
    estimator: Estimator,
    multiples: Mapping[float, float],
) -> tuple[list[Row], list[Row]]:
    """Fit ΔH/η against η, and compute the odd and even parts of pairs ±η.

    Args:
        batch: E.
        at_eta: η → ΔH and its noise floor, for every η with usable weights.
        derivative: ∂_vH from `rows.derivative_of`.
        estimator: estimator of ΔH.
        multiples: η → `eta_over_lr`.

    Returns:
        Rows of `tables.LINEARITY` (none for fewer than two step sizes) and of `tables.ETA_PAIRS`.
    """
    etas = [eta for eta in at_eta if eta]
    changes, floors = [at_eta[eta][0] for eta in etas], [at_eta[eta][1] for eta in etas]
    matching = derivative.of_estimator[estimator]
    fits = []
    if len(etas) >= 2:
        fit = linearity.fit(etas, changes, floors, matching, batch.clusters_N)
        errors = {
            name: (batch.standard_error(estimate) ** 2 + noise**2) ** 0.5
            for name, estimate, noise in (
                ("intercept", fit.intercept, fit.intercept_noise),
                ("difference", fit.difference, math.hypot(fit.intercept_noise, derivative.numerical)),
                ("curvature", fit.curvature, fit.curvature_noise),
            )
        }
        fits.append(
            {
                "estimator": estimator,
                "etas": fit.points,
                "derivative": matching.value,
                "derivative_se": batch.standard_error(matching),
            }
            | {name: getattr(fit, name).value for name in errors}
            | {f"{name}_se": error for name, error in errors.items()}
        )
    pairs = []
    for pair in linearity.pairs(etas, changes):
        remainder = pair.odd.minus(matching.scaled(pair.eta))
        pairs.append(
            {
                "estimator": estimator,
                "eta": pair.eta,
                "eta_over_lr": multiples[pair.eta],
                "odd": pair.odd.value,
                "odd_se": batch.standard_error(pair.odd),
                "odd_remainder": remainder.value,
                "odd_remainder_se": batch.standard_error(remainder),
                "even": pair.even.value,
                "even_se": batch.standard_error(pair.even),
            }
        )
    return fits, pairs


def replicate_rows(found: Mapping[int, tuple[float, float]], learning_rate: float) -> list[Row]:
    """Compute δH₁ at the learning rate on independent E batches, and test if they agree within their standard errors.

    Args:
        found: seed of an E batch → ∂_vH on this batch, and its standard error given U.
        learning_rate: the step size.

    Returns:
        Rows of `tables.REPLICATES`; none for a single batch.
    """
    if len(found) < 2:
        return []
    values_R, errors_R = learning_rate * torch.tensor(list(found.values()), dtype=torch.float64).T
    R, mean = len(found), float(values_R.mean())
    spread = float((((values_R - mean) / errors_R) ** 2).sum()) if bool((errors_R > 0).all()) else 0.0
    shared = {
        "replicates": R,
        "mean": mean,
        "mean_se": float(values_R.std()) / R**0.5,
        "p_value": chi_squared_tail(spread, R - 1),
    }
    return [
        {"seed": seed, "delta_h1": value, "se_given_u": error} | shared
        for seed, value, error in zip(found, values_R.tolist(), errors_R.tolist(), strict=True)
    ]


def predicted_changes(
    logprobs_K: Tensor, entropies_K: Tensor, expected_K: Tensor, advantages_N: Tensor, offsets_N1: Tensor
) -> dict[str, float]:
    """Compute the predictors of `numerics.predictors` on U, per unit step and up to a factor.

    Args:
        logprobs_K: ℓ of U, nats, [K].
        entropies_K: h of U, nats, [K].
        expected_K: E_π[S*] at each token, nats, [K].
        advantages_N: A of each response, [N].
        offsets_N1: int64 [N + 1].

    Returns:
        Predicted changes by name of the predictor.
    """
    advantages_K = ragged.of_tokens(advantages_N, offsets_N1)
    return {
        "token_covariance": predictors.token_covariance(logprobs_K, advantages_K),
        "weighted_token_covariance": predictors.weighted_token_covariance(logprobs_K, advantages_K),
        "discriminator": predictors.discriminator(logprobs_K, entropies_K, advantages_K, expected_K),
    }


def predictor_rows(row: Row, by_literature: Mapping[str, float], on_other_e: Sequence[float] = ()) -> list[Row]:
    """Pair every prediction for one row of estimates with its measured change.

    Args:
        row: columns of `rows.predict`, `second_order.predict` and `rows.measure`.
        by_literature: predictions per unit step, from `predicted_changes`.
        on_other_e: ∂_vH on each further E batch.

    Returns:
        Rows of `tables.PREDICTORS`, without the column `normalization`.
    """
    shared = {"eta": row["eta"], "eta_over_lr": row["eta_over_lr"], "delta_h": row["delta_h"]}
    predicted = {"delta_h1": row["delta_h1"], "delta_h12": row["delta_h12"]}
    if on_other_e:
        predicted["delta_h1_other_e"] = row["eta"] * sum(on_other_e) / len(on_other_e)
    predicted |= {name: row["eta"] * value for name, value in by_literature.items()}
    return [shared | {"predictor": name, "predicted": value} for name, value in predicted.items()]
