"""Predictors of the entropy change from the literature, computed on the tokens of U, per unit step and up to a factor.

They are derived for a tabular softmax policy (separate logits for each state) and a plain policy-gradient step.
Unlike δH₁, they therefore ignore

- the optimizer: preconditioning by the second moments, momentum, weight decay, clipping;
- parameter sharing: a token at one state also changes the distribution at other states;
- the future: the step changes which states are visited and how long responses become.

All tokens of U are pooled, so a covariance also contains the variation between states.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


def _covariance(a_K: Tensor, b_K: Tensor) -> float:
    return float(((a_K - a_K.mean()) * (b_K - b_K.mean())).mean())


def _all_equal(values_C: Tensor) -> bool:
    return bool((values_C == values_C[0]).all())
