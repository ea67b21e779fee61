"""Losses as plain functions: per-token vectors of the update batch in, one number out.

    loss(batch: LossBatch) -> scalar

Everything else follows by differentiation. At the on-policy point, with ℓ and h of every token of U,

    gradient       ∇L = Σ_k (c_k ∇ℓ_k + d_k ∇h_k),   c_k = ∂L/∂ℓ_k,  d_k = ∂L/∂h_k          `coefficients`
    influence      ∂/∂w_i Σ_k (c_k a_k + d_k b_k)  at w = 1                                 `influence`

where a_k and b_k are the derivatives of ℓ_k and h_k along some direction, and w_i is how often response i counts. A
response of weight 2 counts twice in every sum over responses, those in a denominator included; the number of responses
that were drawn is a constant of the experiment, and no weight changes it.

Write x_k for what a token adds. With the response's advantage A, ρ = π/π_old = exp(ℓ − ℓ_old) and a KL term,

    x_k = −A·ρ_k + β·kl_k

and the losses differ in how they average it:

| loss      | L                                              | source                                           |
|-----------|------------------------------------------------|--------------------------------------------------|
| grpo      | mean over responses of (1/T) Σ_k x_k           | arXiv:2402.03300, eq. 3                          |
| dr_grpo   | mean over responses of Σ_k x_k/max_new_tokens  | arXiv:2503.20783                                 |
| dapo      | mean over tokens of x_k                        | arXiv:2503.14476, eq. 8                          |
| bnpo      | mean over the tokens of each micro-batch       | TRL's GRPOTrainer                                |
| luspo     | mean over responses of Σ_k x_k                 | arXiv:2602.05261                                 |
| cispo     | mean over tokens, x_k with −A·ρ̄_k·ℓ_k for −A·ρ_k, ρ̄ capped and constant | arXiv:2506.13585       |
| rloo      | mean over responses of −A·Π_k ρ_k              | arXiv:2402.14740                                 |
| reinforce | mean over responses of −A·Σ_k ℓ_k              | Williams 1992, doi:10.1007/BF00992696            |

`Objective` has what TRL's settings change about the first six. Advantages are a function of the rewards alone: see
`advantages`. The ratio ρ is 1 at the on-policy point, where clipping it does nothing, so the losses do without.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch

LossFunction = Callable[[LossBatch], Tensor]
"""The loss of a batch: a float64 scalar, differentiable twice."""


def kl(batch: LossBatch) -> Tensor:
    """Per-token estimate of KL(π‖π_ref), nats, [K]: e^(ℓ_ref−ℓ) − (ℓ_ref−ℓ) − 1, the k3 of Schulman, "Approximating KL
    divergence" (2020), as TRL's GRPOTrainer has it; 0 without a reference."""
    if batch.reference_logprobs_K is None:
        return torch.zeros_like(batch.logprobs_K)
    log_ratio_K = batch.reference_logprobs_K - batch.logprobs_K
    return log_ratio_K.expm1() - log_ratio_K


def importance_ratio(batch: LossBatch) -> Tensor:
    """ρ of every token, or of its whole response: see `Objective.importance_sampling_level`; [K]."""
    log_ratio_K = batch.logprobs_K - batch.old_logprobs_K
    if batch.objective.importance_sampling_level == "sequence":
        log_ratio_K = batch.of_tokens(batch.sequence_sum(log_ratio_K) / batch.lengths_N.clamp_min(1))
    return log_ratio_K.exp()


def high_entropy_mask(batch: LossBatch) -> Tensor:
    """1 for the tokens of each micro-batch that count and whose entropy is in the top quantile, float64 [K].

    The threshold is the (1 − q)-quantile of the entropies in float32, as TRL's `get_high_entropy_mask` takes it.
    """
    share = batch.objective.top_entropy_quantile
    if share >= 1:
        return batch.mask_K
    entropies_K, chosen_K = batch.entropies_K.detach().float(), torch.zeros_like(batch.mask_K)
    micro_batches_K = batch.of_tokens(batch.micro_batches_N)
    for micro_batch in range(int(batch.micro_batches_N.max()) + 1):
        here_K = (micro_batches_K == micro_batch) & (batch.mask_K > 0)
        if here_K.any():
            threshold = torch.quantile(entropies_K[here_K], 1 - share)
            chosen_K[here_K & (entropies_K >= threshold)] = 1
    return chosen_K


def policy_gradient(batch: LossBatch) -> Tensor:
    """x_k = −A·ρ_k + β·kl_k of every token, with its settings in `Objective`, [K]."""
    return _with_kl(batch, importance_ratio(batch))


def _with_kl(batch: LossBatch, ratio_K: Tensor) -> Tensor:
    """−A·ρ of the tokens that have a policy term, with the KL term; ρ as the loss has it."""
    x_K = -batch.of_tokens(batch.advantages_N) * ratio_K * high_entropy_mask(batch)
    if not batch.kl_beta:
        return x_K
    correction_K = importance_ratio(batch) if batch.objective.kl_correction else 1.0
    return x_K + batch.kl_beta * kl(batch) * correction_K


def entropy_bonus(batch: LossBatch) -> Tensor | float:
    """`entropy_coef` times the mean entropy of the tokens with a policy term, of each micro-batch."""
    if not batch.objective.entropy_coef:
        return 0.0
    mask_K = high_entropy_mask(batch)
    sum_N, count_N = (batch.sequence_sum(mask_K * x_K) for x_K in (batch.entropies_K, torch.ones_like(mask_K)))
    return batch.objective.entropy_coef * batch.micro_mean(sum_N, count_N)


def grpo(batch: LossBatch) -> Tensor:
    """Group relative policy optimisation, arXiv:2402.03300, eq. 3: each response averages over its own tokens."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch)) / batch.lengths_N.clamp_min(1)) - entropy_bonus(batch)


def dr_grpo(batch: LossBatch) -> Tensor:
    """GRPO done right, arXiv:2503.20783: a constant in the place of the length."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) / batch.max_new_tokens - entropy_bonus(batch)


def dapo(batch: LossBatch) -> Tensor:
    """DAPO, arXiv:2503.14476, eq. 8: all tokens of the batch count alike."""
    return _token_mean(batch, policy_gradient(batch)) - entropy_bonus(batch)


def bnpo(batch: LossBatch) -> Tensor:
    """TRL's BNPO: all tokens of a micro-batch count alike, and all micro-batches."""
    return batch.micro_mean(batch.sequence_sum(policy_gradient(batch)), batch.lengths_N) - entropy_bonus(batch)


def luspo(batch: LossBatch) -> Tensor:
    """LUSPO, arXiv:2602.05261, as TRL has it: the sum over a response, whatever its length."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) - entropy_bonus(batch)


def cispo(batch: LossBatch) -> Tensor:
    """CISPO, arXiv:2506.13585: the ratio is a constant weight with a cap, and ℓ is what is differentiated."""
    ratio_K, cap = importance_ratio(batch).detach(), batch.objective.epsilon_high
    capped_K = ratio_K if cap is None else ratio_K.clamp_max(cap)
    return _token_mean(batch, _with_kl(batch, capped_K * batch.logprobs_K)) - entropy_bonus(batch)


def _token_mean(batch: LossBatch, x_K: Tensor) -> Tensor:
    return batch.mean(batch.sequence_sum(x_K)) / batch.mean(batch.lengths_N)


def rloo(batch: LossBatch) -> Tensor:
    """REINFORCE leave-one-out, arXiv:2402.14740: the ratio is that of the whole response."""
    ratio_N = batch.sequence_sum(batch.logprobs_K - batch.old_logprobs_K).exp()
    return batch.mean(-batch.advantages_N * ratio_N + batch.kl_beta * batch.sequence_sum(kl(batch)))


def reinforce(batch: LossBatch) -> Tensor:
    """REINFORCE, Williams 1992, doi:10.1007/BF00992696: the log-probability of the whole response."""
    score_N = batch.sequence_sum(batch.logprobs_K)
    return batch.mean(-batch.advantages_N * score_N + batch.kl_beta * batch.sequence_sum(kl(batch)))


LOSSES: dict[str, LossFunction] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "bnpo": bnpo,
    "luspo": luspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce": reinforce,
}


def coefficients(loss: LossFunction, batch: LossBatch) -> TokenPair:
    """c_k = ∂L/∂ℓ_k and d_k = ∂L/∂h_k: what the gradient of the loss weighs ∇ℓ_k and ∇h_k with.

    Args:
        loss: the loss.
        batch: U.

    Returns:
        Float64 [K]; zero where the loss does not depend on it.

    Raises:
        RuntimeError: the loss depends on neither.
    """
    return _gradient(loss, batch, twice=False)


def influence(loss: LossFunction, batch: LossBatch, along: TokenPair) -> Tensor:
    """What each response does to the derivative of the loss along a direction: ∂/∂w_i Σ_k (c_k a_k + d_k b_k).

    The derivative is ⟨w, ∇L⟩ for the direction w that a_k = ⟨w, ∇ℓ_k⟩ and b_k = ⟨w, ∇h_k⟩ were taken along. A response
    acts by its own terms, and by what is divided by: under `dapo` a long one shrinks the terms of all others.

    Args:
        loss: the loss.
        batch: U.
        along: a_k and b_k.

    Returns:
        Float64 [N]; the sum over the responses to a prompt is the influence of the prompt.

    Raises:
        RuntimeError: the loss depends on neither ℓ nor h, or the weights do not enter it.
    """
    weights_N = batch.weights_N.detach().clone().requires_grad_()
    derivative = _gradient(loss, replace(batch, weights_N=weights_N), twice=True).dot(along).sum()
    (influence_N,) = torch.autograd.grad(derivative, weights_N)
    return influence_N


def _gradient(loss: LossFunction, batch: LossBatch, twice: bool) -> TokenPair:
    ends = [values_K.detach().clone().requires_grad_() for values_K in (batch.logprobs_K, batch.entropies_K)]
    value = loss(replace(batch, logprobs_K=ends[0], entropies_K=ends[1]))
    return TokenPair(*torch.autograd.grad(value, ends, create_graph=twice, materialize_grads=True))
