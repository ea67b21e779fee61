"""Advantages within prompt groups, and the weight that a loss gives to each response's log-probability.

The loss at the on-policy point (probability ratio 1, clipping inactive) is

    −(1/(P·G)) Σ_i A_i (1/Z_i) Σ_k ℓ_ik   [ + β (1/(P·G)) Σ_i (1/Z_i) Σ_k kl_ik ]

| loss      | A_i                                             | Z_i             | source                  |
|-----------|-------------------------------------------------|-----------------|-------------------------|
| grpo      | (r_i − mean)/(std + 1e-4), std with G − 1       | T_i             | arXiv:2402.03300, eq. 3 |
| dr_grpo   | r_i − mean                                      | max_new_tokens  | arXiv:2503.20783        |
| dapo      | as grpo                                         | mean T of batch | arXiv:2503.14476, eq. 8 |
| rloo      | r_i − mean of the other responses of the prompt | 1               | arXiv:2402.14740        |
| reinforce | r_i                                             | 1               | Williams 1992           |

Trainers also let the division by the standard deviation be switched by itself (TRL's `scale_rewards`), for any loss.
"""

from typing import Literal

import torch
from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce"]
Scaling = Literal["auto", "group", "none"]
STD_EPSILON = 1e-4  # as in TRL's GRPOTrainer


def group_advantages(rewards_PG: Tensor, loss: Loss, scaling: Scaling = "auto") -> Tensor:
    """Advantage of each response among the responses to its prompt.

    Args:
        rewards_PG: float64 [P, G], G ≥ 2.
        loss: which rule.
        scaling: whether the advantages of a group are divided by std + 1e-4; `auto`: as in the table.

    Returns:
        float64 [P, G]; a group of equal rewards has advantages of exactly zero, but under `reinforce`.

    Raises:
        ValueError: fewer than two responses per prompt, or an unknown loss.
    """
    G = rewards_PG.shape[1]
    if G < 2:
        raise ValueError(f"advantages within a group need at least two responses per prompt, got {G}")
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # the mean of equal numbers can miss them by a rounding error, which the standardisation would blow up
    equal_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
    centred_PG = centred_PG.masked_fill(equal_P1, 0.0)
    rule = {"grpo": centred_PG, "dapo": centred_PG, "dr_grpo": centred_PG, "rloo": centred_PG * (G / (G - 1))}
    if loss not in rule and loss != "reinforce":
        raise ValueError(f"unknown loss {loss!r}")
    advantages_PG = rule.get(loss, rewards_PG)
    if scaling == "group" or (scaling == "auto" and loss in ("grpo", "dapo")):
        return advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + STD_EPSILON)
    return advantages_PG


def token_weights(lengths_N: Tensor, loss: Loss, max_new_tokens: int) -> Tensor:
    """Weight 1/(P·G·Z_i) of every token of response i in the loss.

    Args:
        lengths_N: int64 [N], T_i ≥ 1; responses with zero advantage stay in the denominator.
        loss: which normalisation.
        max_new_tokens: the constant length of `dr_grpo`.

    Returns:
        float64 [N].
    """
    if loss == "grpo":
        scale_N = lengths_N.double()
    elif loss == "dapo":
        scale_N = lengths_N.double().mean().expand(len(lengths_N))
    elif loss == "dr_grpo":
        scale_N = lengths_N.new_full(lengths_N.shape, max_new_tokens).double()
    else:
        scale_N = lengths_N.new_ones(lengths_N.shape).double()
    return 1.0 / (len(lengths_N) * scale_N)


def loss_coefficients(advantages_N: Tensor, lengths_N: Tensor, loss: Loss, max_new_tokens: int) -> Tensor:
    """Coefficient of every ℓ_ik of response i in the loss: −A_i/(P·G·Z_i).

    Args:
        advantages_N: float64 [N], N = P·G.
        lengths_N: see `token_weights`.
        loss: which normalisation.
        max_new_tokens: see `token_weights`.

    Returns:
        float64 [N].
    """
    return -advantages_N * token_weights(lengths_N, loss, max_new_tokens)


def kl_coefficients(logprobs_K: Tensor, reference_logprobs_K: Tensor) -> Tensor:
    """Derivative with respect to ℓ of the per-token estimate of KL(π‖π_ref) that trainers add to the loss.

    The estimate is e^(r−ℓ) − (r−ℓ) − 1, with r the reference's log-probability (k3 of Schulman, "Approximating KL
    divergence", 2020; TRL's GRPOTrainer); its derivative is 1 − e^(r−ℓ).

    Args:
        logprobs_K: ℓ, nats, [K].
        reference_logprobs_K: r, nats, [K].

    Returns:
        float64 [K]; to be multiplied by β and the token's weight in the loss.
    """
    return -torch.expm1(reference_logprobs_K.double() - logprobs_K.double())


def through_shared_length(influence_N: Tensor, lengths_N: Tensor, loss: Loss) -> Tensor:
    """Influence of each response on ⟨w, g⟩, given its term in the sum.

    Under `dapo` the denominator is the batch's number of tokens, so a long response also shrinks the terms of all
    others: with n_i the term of response i, d(Σn/ΣT) has the part −(T_i/ΣT)·Σn.

    Args:
        influence_N: the terms ⟨w, g_i⟩, float64 [N].
        lengths_N: T_i, int64 [N].
        loss: the objective.

    Returns:
        float64 [N].
    """
    if loss != "dapo":
        return influence_N
    return influence_N - lengths_N.double() / lengths_N.sum() * influence_N.sum()
