"""Predictors of the entropy change from the literature, computed on the tokens of U, per unit step and up to a factor.

They are derived for a tabular softmax policy (separate logits for each state) and a plain policy-gradient step.
Unlike δH₁, they therefore ignore

- the optimizer: preconditioning by the second moments, momentum, weight decay, clipping;
- parameter sharing: a token at one state also changes the distribution at other states;
- the future: the step changes which states are visited and how long responses become.

All tokens of U are pooled, so a covariance also contains the variation between states.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.uncertainty import normal_quantile


class Agreement(NamedTuple):
    """Agreement of predicted with measured changes; a field is None for too few points or for equal values."""

    slope: float | None
    r_squared: float | None
    sign_accuracy: float | None
    points: int


def token_covariance(logprobs_K: Tensor, advantages_K: Tensor) -> float:
    """Return −Cov(log π(a|s), A) over the tokens, the change under a natural policy-gradient step.

    Such a step moves the logits by ηA, without a factor π. The module docstring lists the effects it ignores.

    Args:
        logprobs_K: ℓ, nats, [K].
        advantages_K: A of the token's response, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2505.22617, whose Clip-Cov ranks tokens by these terms.
    """
    return -_covariance(logprobs_K.double(), advantages_K.double())


def weighted_token_covariance(logprobs_K: Tensor, advantages_K: Tensor) -> float:
    """Return −Cov(log π(a|s), π(a|s)·A) over the tokens, the change under a policy-gradient step.

    Such a step moves the logits by ηπA if A has mean zero at every state. The module docstring lists the effects it
    ignores.

    Args:
        logprobs_K: ℓ, nats, [K].
        advantages_K: A of the token's response, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2505.22617.
    """
    logprobs_K = logprobs_K.double()
    return -_covariance(logprobs_K, logprobs_K.exp() * advantages_K.double())


def discriminator(logprobs_K: Tensor, entropies_K: Tensor, advantages_K: Tensor, expected_K: Tensor) -> float:
    """Return −mean A·(S* − E_π[S*]) over the tokens, with S* = π(a|s)(h + log π(a|s)).

    Reinforcing a token moves the logits of its state by ηA(e_a − π) and the entropy of that state by
    −ηA(S* − E_π[S*]), whatever the advantages of other tokens. The module docstring lists the effects it ignores.

    Args:
        logprobs_K: ℓ, nats, [K].
        entropies_K: h, nats, [K].
        advantages_K: A of the token's response, [K].
        expected_K: E_π[S*] at each token from `token_statistics.expected_discriminator`, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2602.03392, theorem 3.3, for GRPO.
    """
    logprobs_K = logprobs_K.double()
    excess_K = logprobs_K.exp() * (entropies_K.double() + logprobs_K) - expected_K.double()
    return -float((advantages_K.double() * excess_K).mean())


def agreement(predicted_C: Tensor, measured_C: Tensor) -> Agreement:
    """Regress measured on predicted changes, with an intercept, and count how often their signs agree.

    Args:
        predicted_C: one prediction per case, [C].
        measured_C: measured changes, [C]; cases with a non-finite value are ignored.

    Returns:
        Slope and R² (None for fewer than two cases or equal predictions; R² is also None for two cases or equal
        measurements), the share of cases with equal signs (None for no cases), and the number of cases.
    """
    usable_C = torch.isfinite(predicted_C) & torch.isfinite(measured_C)
    predicted_C, measured_C = predicted_C[usable_C].double(), measured_C[usable_C].double()
    points = len(predicted_C)
    if points == 0:
        return Agreement(None, None, None, 0)
    same_sign = float((predicted_C.sign() == measured_C.sign()).double().mean())
    if _all_equal(predicted_C):
        return Agreement(None, None, same_sign, points)
    covariance, variance = _covariance(predicted_C, measured_C), _covariance(predicted_C, predicted_C)
    slope = covariance / variance
    tells = points > 2 and not _all_equal(measured_C)  # any two points are on a line
    r_squared = slope * covariance / _covariance(measured_C, measured_C) if tells else None
    return Agreement(slope, r_squared, same_sign, points)


def slope_standard_error(predicted_C: Tensor, measured_C: Tensor) -> float | None:
    """Compute the standard error of the slope of `agreement`, for cases with independent errors.

    An error that all cases share goes into the intercept and does not count.

    Args:
        predicted_C: one prediction per case, [C], finite.
        measured_C: measured changes, [C], finite.

    Returns:
        √(Σr²/((C − 2)·Σ(x − x̄)²)) with residuals r; None for fewer than three cases or equal predictions.
    """
    points, (x_C, y_C) = len(predicted_C), (predicted_C.double(), measured_C.double())
    if points < 3 or _all_equal(x_C):
        return None
    x_C, y_C = x_C - x_C.mean(), y_C - y_C.mean()
    residual_C = y_C - float(x_C @ y_C / (x_C @ x_C)) * x_C
    return float(residual_C @ residual_C / ((points - 2) * (x_C @ x_C))) ** 0.5


class RankCorrelation(NamedTuple):
    """Kendall's τ of two rankings, and the probability of one as far from 0 if they had nothing to do with another."""

    tau: float
    p_value: float


def rank_correlation(predicted_C: Tensor, measured_C: Tensor) -> RankCorrelation | None:
    """Compute Kendall's τ with its exact two-sided p-value.

    Args:
        predicted_C: one prediction per case, [C], finite.
        measured_C: measured changes, [C], finite.

    Returns:
        τ = 1 − 4·(pairs that are ordered differently)/(C(C − 1)), and p from the number of permutations by inversions;
        None for fewer than two cases, or if there are ties.
    """
    points = len(predicted_C)
    if points < 2 or any(len(values_C.unique()) < points for values_C in (predicted_C, measured_C)):
        return None
    ranked_C = measured_C[predicted_C.argsort()]
    later_CC = torch.ones(points, points).triu(1).bool()
    inversions = int(((ranked_C.unsqueeze(1) > ranked_C) & later_CC).sum())
    # how many permutations of n cases have each number of inversions: Π_k (1 + q + … + q^{k−1})
    permutations = [1]
    for k in range(2, points + 1):
        longer = [0] * (len(permutations) + k - 1)
        for i, count in enumerate(permutations):
            for more in range(k):
                longer[i + more] += count
        permutations = longer
    pairs = len(permutations) - 1
    as_far = sum(n for i, n in enumerate(permutations) if abs(2 * i - pairs) >= abs(2 * inversions - pairs))
    return RankCorrelation(1 - 2 * inversions / pairs, as_far / sum(permutations))


def points_needed(r_squared: float) -> int | None:
    """Return how many cases it takes to tell a correlation from 0, at 5 % and in 80 % of all samples.

    Args:
        r_squared: square of the correlation.

    Returns:
        ((1.96 + 0.84)/artanh √R²)² + 3 (Fisher's z), at least 4; None for no correlation.
    """
    if r_squared <= 0.0:
        return None
    z = math.atanh(min(r_squared, 1 - 1e-12) ** 0.5)
    return max(4, math.ceil(((normal_quantile(0.95) + normal_quantile(0.6)) / z) ** 2 + 3))


def _covariance(a_K: Tensor, b_K: Tensor) -> float:
    return float(((a_K - a_K.mean()) * (b_K - b_K.mean())).mean())


def _all_equal(values_C: Tensor) -> bool:
    return bool((values_C == values_C[0]).all())
