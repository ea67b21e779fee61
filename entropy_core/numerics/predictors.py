"""Predictors of the entropy change from the literature, each from the tokens of U and up to a factor per unit step.

They are derived for a softmax policy with logits of its own at each state, moved by a plain policy-gradient step. All
of them therefore leave out what δH₁ has in it:

- the optimizer: preconditioning by the second moments, momentum, weight decay, clipping;
- parameters that states share, so that a token of one state moves the distribution of another;
- the future part: that the step changes which states are visited, and how long responses become.

The tokens of U stand for all states at once, so spread between states enters a covariance as if it were one within.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Agreement(NamedTuple):
    """Of predicted with measured changes; None where there are too few, or where they do not differ."""

    slope: float | None
    r_squared: float | None
    sign_accuracy: float | None
    points: int


def token_covariance(logprobs_K: Tensor, advantages_K: Tensor) -> float:
    """−Cov(log π(a|s), A) over the tokens: the change under a natural policy-gradient step.

    Its logits move by ηA, which needs no factor π. See the module for what it leaves out.

    Args:
        logprobs_K: ℓ, nats, [K].
        advantages_K: A of the token's response, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2505.22617, whose Clip-Cov ranks tokens by its terms.
    """
    return -_covariance(logprobs_K.double(), advantages_K.double())


def weighted_token_covariance(logprobs_K: Tensor, advantages_K: Tensor) -> float:
    """−Cov(log π(a|s), π(a|s)·A) over the tokens: the change under a policy-gradient step.

    Its logits move by ηπA, if A has mean zero at every state. See the module for what it leaves out.

    Args:
        logprobs_K: ℓ, nats, [K].
        advantages_K: A of the token's response, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2505.22617.
    """
    logprobs_K = logprobs_K.double()
    return -_covariance(logprobs_K, logprobs_K.exp() * advantages_K.double())


def discriminator(logprobs_K: Tensor, entropies_K: Tensor, advantages_K: Tensor, expected_K: Tensor) -> float:
    """−mean A·(S* − E_π[S*]) over the tokens, S* = π(a|s)(h + log π(a|s)).

    A token that is reinforced moves the logits of its own state by ηA(e_a − π), and that state's entropy by
    −ηA(S* − E_π[S*]), whatever the advantages of the other tokens. See the module for what it leaves out.

    Args:
        logprobs_K: ℓ, nats, [K].
        entropies_K: h, nats, [K].
        advantages_K: A of the token's response, [K].
        expected_K: E_π[S*] of the step, of `token_statistics.expected_discriminator`, [K].

    Returns:
        Nats times the unit of A, per unit step. Source: arXiv:2602.03392, theorem 3.3, for GRPO.
    """
    logprobs_K = logprobs_K.double()
    excess_K = logprobs_K.exp() * (entropies_K.double() + logprobs_K) - expected_K.double()
    return -float((advantages_K.double() * excess_K).mean())


def agreement(predicted_C: Tensor, measured_C: Tensor) -> Agreement:
    """Least squares line of measured on predicted changes, with an intercept, and how often their signs agree.

    Args:
        predicted_C: one prediction per case, [C].
        measured_C: what was measured, [C]; a case where either is not finite is left out.

    Returns:
        Slope and R² of the line (None for fewer than two cases or equal predictions; R² also for two cases, or equal
        measurements), the share of cases of the same sign (None without a case), and the number of cases.
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
