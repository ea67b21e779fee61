"""Losses as plain functions from per-token vectors of the update batch U to a scalar.

    loss(batch: LossBatch) -> scalar

Everything else follows by differentiation. On-policy, with log-probability ℓ_k and entropy h_k of every token of U,

    gradient       ∇L = Σ_k (c_k ∇ℓ_k + d_k ∇h_k),   c_k = ∂L/∂ℓ_k,  d_k = ∂L/∂h_k          `coefficients`
    influence      ∂/∂w_i Σ_k (c_k a_k + d_k b_k)  at w = 1                                 `influence`

where a_k and b_k are the derivatives of ℓ_k and h_k along some direction, and w_i is the weight of response i. A
response of weight 2 counts twice in every sum over responses, including sums in a denominator; the number of responses
drawn stays constant.

Let x_k be the term of one token. With the response's advantage A, ρ = π/π_old = exp(ℓ − ℓ_old) and a KL term,

    x_k = −A·ρ_k + β·kl_k

The losses differ in how they average x_k:

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

`Objective` holds the settings with which TRL modifies the first six. Advantages depend on the rewards alone; see
`advantages`. On-policy, the ratio ρ is 1 and clipping it has no effect. In the later steps on a rollout it is another:
then `Objective.off_policy` says how ρ is clipped, in all losses but reinforce, which has none, and cispo, which has a
cap of its own; and which responses lose their policy term.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from entropy_core.numerics.clipping import Clipped, clipped, clipped_ratio, kept_responses
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch

LossFunction = Callable[[LossBatch], Tensor]
"""Maps a batch to its loss, a float64 scalar that is twice differentiable."""


def kl(batch: LossBatch) -> Tensor:
    """Estimate KL(π‖π_ref) per token as e^(ℓ_ref−ℓ) − (ℓ_ref−ℓ) − 1, nats, [K]; 0 without a reference.

    This is k3 of Schulman, "Approximating KL divergence" (2020), which TRL's GRPOTrainer uses.
    """
    if batch.reference_logprobs_K is None:
        return torch.zeros_like(batch.logprobs_K)
    log_ratio_K = batch.reference_logprobs_K - batch.logprobs_K
    return log_ratio_K.expm1() - log_ratio_K


def importance_ratio(batch: LossBatch) -> Tensor:
    """Return ρ of every token or of its whole response, as `Objective.importance_sampling_level` says, [K]."""
    log_ratio_K = batch.logprobs_K - batch.old_logprobs_K
    if batch.objective.importance_sampling_level == "sequence":
        log_ratio_K = batch.of_tokens(batch.sequence_sum(log_ratio_K) / batch.lengths_N.clamp_min(1))
    return log_ratio_K.exp()


def _whole_ratio(batch: LossBatch) -> Tensor:
    """Return Π_k ρ_k of each response, [N]."""
    return batch.sequence_sum(batch.logprobs_K - batch.old_logprobs_K).exp()


def kept_by_the_off_policy_mask(batch: LossBatch) -> Tensor:
    """Return 1 for each response that keeps its policy term, else 0, float64 [N]."""
    rule = batch.objective.off_policy
    if rule is None or rule.off_policy_mask_threshold is None:
        return torch.ones_like(batch.advantages_N)
    drift_K = batch.old_logprobs_K - batch.logprobs_K.detach()
    drift_N = batch.sequence_sum(drift_K) / batch.lengths_N.clamp_min(1)
    return kept_responses(drift_N, batch.advantages_N, rule.off_policy_mask_threshold).double()


def clipped_tokens(name: str, batch: LossBatch) -> Clipped | None:
    """Say which tokens a loss of this module clips, bool [K] each; None if it clips none, or is not known.

    Args:
        name: of the loss.
        batch: a minibatch, off-policy.
    """
    rule, advantages_K = batch.objective.off_policy, batch.of_tokens(batch.advantages_N)
    if rule is None or name not in LOSSES or name == "reinforce":
        return None
    if name == "cispo":
        cap = batch.objective.epsilon_high
        high_K = (importance_ratio(batch) > (torch.inf if cap is None else cap)) & (advantages_K > 0)
        return Clipped(torch.zeros_like(high_K), high_K, torch.zeros_like(high_K))
    ratio_K = batch.of_tokens(_whole_ratio(batch)) if name == "rloo" else importance_ratio(batch)
    return clipped(ratio_K, advantages_K, rule)


def _clipped(batch: LossBatch, ratio: Tensor, advantages: Tensor) -> Tensor:
    rule = batch.objective.off_policy
    return ratio if rule is None else clipped_ratio(ratio, advantages, rule)


def high_entropy_mask(batch: LossBatch) -> Tensor:
    """Return 1 for tokens that count and whose entropy is in the top quantile of their micro-batch, else 0, [K].

    The threshold is the (1 − q)-quantile of the entropies in float32, as in TRL's `get_high_entropy_mask`.
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
    """Return x_k = −A·ρ_k + β·kl_k of every token, modified by the settings in `Objective`, [K]."""
    return _with_kl(batch, _clipped(batch, importance_ratio(batch), batch.of_tokens(batch.advantages_N)))


def _with_kl(batch: LossBatch, ratio_K: Tensor) -> Tensor:
    """Return −A·ρ at tokens that keep the policy term, plus the KL term; `ratio_K` is the ρ of this loss."""
    x_K = -batch.of_tokens(batch.advantages_N) * ratio_K * high_entropy_mask(batch)
    if batch.objective.off_policy is not None:
        x_K = x_K * batch.of_tokens(kept_by_the_off_policy_mask(batch))
    if not batch.kl_beta:
        return x_K
    correction_K = importance_ratio(batch) if batch.objective.kl_correction else 1.0
    return x_K + batch.kl_beta * kl(batch) * correction_K


def entropy_bonus(batch: LossBatch) -> Tensor | float:
    """Return `entropy_coef` times the mean entropy of tokens with a policy term, averaged over micro-batches."""
    if not batch.objective.entropy_coef:
        return 0.0
    mask_K = high_entropy_mask(batch)
    sum_N, count_N = (batch.sequence_sum(mask_K * x_K) for x_K in (batch.entropies_K, torch.ones_like(mask_K)))
    return batch.objective.entropy_coef * batch.micro_mean(sum_N, count_N)


def grpo(batch: LossBatch) -> Tensor:
    """Group relative policy optimisation, arXiv:2402.03300, eq. 3: mean over the tokens of each response."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch)) / batch.lengths_N.clamp_min(1)) - entropy_bonus(batch)


def dr_grpo(batch: LossBatch) -> Tensor:
    """GRPO done right, arXiv:2503.20783: divides by a constant instead of the response length."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) / batch.max_new_tokens - entropy_bonus(batch)


def dapo(batch: LossBatch) -> Tensor:
    """DAPO, arXiv:2503.14476, eq. 8: all tokens of the batch have equal weight."""
    return _token_mean(batch, policy_gradient(batch)) - entropy_bonus(batch)


def bnpo(batch: LossBatch) -> Tensor:
    """TRL's BNPO: all tokens of a micro-batch have equal weight, and so have all micro-batches."""
    return batch.micro_mean(batch.sequence_sum(policy_gradient(batch)), batch.lengths_N) - entropy_bonus(batch)


def luspo(batch: LossBatch) -> Tensor:
    """LUSPO, arXiv:2602.05261, as implemented in TRL: sum over the tokens of a response, whatever its length."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) - entropy_bonus(batch)


def cispo(batch: LossBatch) -> Tensor:
    """CISPO, arXiv:2506.13585: the gradient flows through ℓ, and the capped ratio is a constant weight."""
    ratio_K, cap = importance_ratio(batch).detach(), batch.objective.epsilon_high
    capped_K = ratio_K if cap is None else ratio_K.clamp_max(cap)
    return _token_mean(batch, _with_kl(batch, capped_K * batch.logprobs_K)) - entropy_bonus(batch)


def _token_mean(batch: LossBatch, x_K: Tensor) -> Tensor:
    length = batch.mean(batch.lengths_N) if batch.rollout_length is None else batch.rollout_length
    return batch.mean(batch.sequence_sum(x_K)) / length


def rloo(batch: LossBatch) -> Tensor:
    """REINFORCE leave-one-out, arXiv:2402.14740: uses the ratio of the whole response."""
    ratio_N = _clipped(batch, _whole_ratio(batch), batch.advantages_N)
    return batch.mean(-batch.advantages_N * ratio_N + batch.kl_beta * batch.sequence_sum(kl(batch)))


def reinforce(batch: LossBatch) -> Tensor:
    """REINFORCE, Williams 1992, doi:10.1007/BF00992696: uses the log-probability of the whole response."""
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
    """Return c_k = ∂L/∂ℓ_k and d_k = ∂L/∂h_k, the coefficients of ∇ℓ_k and ∇h_k in the gradient of the loss.

    Args:
        loss: the loss.
        batch: U.

    Returns:
        c and d, float64 [K]; zero where the loss does not depend on ℓ_k or h_k.

    Raises:
        RuntimeError: the loss depends on neither ℓ nor h.
    """
    return _gradient(loss, batch, twice=False)


def influence(loss: LossFunction, batch: LossBatch, along: TokenPair) -> Tensor:
    """Return the influence of each response on a directional derivative of the loss: ∂/∂w_i Σ_k (c_k a_k + d_k b_k).

    For a direction z, a_k = ⟨z, ∇ℓ_k⟩ and b_k = ⟨z, ∇h_k⟩, the sum is ⟨z, ∇L⟩. A response acts through its own terms
    and through the denominator: under `dapo` a long response shrinks the terms of all others.

    Args:
        loss: the loss.
        batch: U.
        along: a_k and b_k, each [K].

    Returns:
        float64 [N]; the sum over the responses to a prompt is the influence of the prompt.

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
