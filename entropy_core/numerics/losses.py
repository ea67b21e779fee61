"""Losses as plain functions: per-token vectors of the update batch in, one number out.

    loss(batch: LossBatch) -> scalar

Everything else follows by differentiation. At the on-policy point, with ℓ and h of every token of U,

    gradient       ∇L = Σ_k (c_k ∇ℓ_k + d_k ∇h_k),   c_k = ∂L/∂ℓ_k,  d_k = ∂L/∂h_k          `coefficients`
    influence      ∂/∂w_i Σ_k (c_k a_k + d_k b_k)  at w = 1                                 `influence`

where a_k and b_k are the derivatives of ℓ_k and h_k along some direction, and w_i is how often response i counts. A
response of weight 2 counts twice in every sum over responses, those in a denominator included; the number of responses
that were drawn is a constant of the experiment, and no weight changes it.

Write x_k for what a token adds. With the response's advantage A, π/π_old = exp(ℓ − ℓ_old) and a KL term,

    x_k = −A·π/π_old + β·kl_k

and the losses differ in how they average it:

| loss      | L                                              | source                                           |
|-----------|------------------------------------------------|--------------------------------------------------|
| grpo      | mean over responses of (1/T) Σ_k x_k           | arXiv:2402.03300, eq. 3                          |
| dr_grpo   | mean over responses of Σ_k x_k/max_new_tokens  | arXiv:2503.20783                                 |
| dapo      | mean over tokens of x_k                        | arXiv:2503.14476, eq. 8                          |
| rloo      | mean over responses of −A·Π_k π/π_old          | arXiv:2402.14740                                 |
| reinforce | mean over responses of −A·Σ_k ℓ_k              | Williams 1992, doi:10.1007/BF00992696            |

Advantages are a function of the rewards alone: see `advantages`. The ratio π/π_old is 1 at the on-policy point, where
clipping it does nothing, so the losses do without.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.functional import TokenPair


@dataclass(frozen=True)
class LossBatch:
    """The update batch U as a loss sees it: N responses, flat, K tokens in all; response i has the tokens
    `offsets_N1[i]:offsets_N1[i + 1]`.

    Args:
        logprobs_K: ℓ, log-probability of each token, nats, float64; to be differentiated.
        entropies_K: h, full-softmax entropy of the step of each token, nats, float64; to be differentiated.
        old_logprobs_K: ℓ_old under the policy that sampled U, float64; equal to ℓ on-policy, and constant.
        reference_logprobs_K: ℓ_ref under the reference policy, float64; None without a KL term.
        mask_K: 1 for a token that counts, 0 for one that does not, float64.
        offsets_N1: int64 [N + 1].
        advantages_N: A of each response, float64.
        rewards_N: its reward, float64.
        prompts_N: which prompt of U it answers, int64, from 0.
        weights_N: how often each response counts, float64; `mean` applies it. 1, but for the influence.
        responses: how many responses were drawn.
        max_new_tokens: where a response is cut.
        kl_beta: β of the KL term; 0 for none.
    """

    logprobs_K: Tensor
    entropies_K: Tensor
    old_logprobs_K: Tensor
    reference_logprobs_K: Tensor | None
    mask_K: Tensor
    offsets_N1: Tensor
    advantages_N: Tensor
    rewards_N: Tensor
    prompts_N: Tensor
    weights_N: Tensor
    responses: int
    max_new_tokens: int
    kl_beta: float

    @classmethod
    def on_policy(
        cls,
        logprobs_K: Tensor,
        entropies_K: Tensor,
        offsets_N1: Tensor,
        advantages_PG: Tensor,
        rewards_PG: Tensor,
        *,
        max_new_tokens: int,
        reference_logprobs_K: Tensor | None = None,
        kl_beta: float = 0.0,
    ) -> "LossBatch":
        """U at the policy that sampled it, with every token and every response counting once.

        Args:
            logprobs_K: ℓ, nats, [K].
            entropies_K: h, nats, [K].
            offsets_N1: int64 [N + 1], the responses to one prompt together.
            advantages_PG: of P prompts × G responses.
            rewards_PG: likewise.
            max_new_tokens: where a response is cut.
            reference_logprobs_K: ℓ_ref, nats, [K]; None without a KL term.
            kl_beta: β of the KL term.

        Returns:
            The batch, in float64.
        """
        P, G = rewards_PG.shape
        logprobs_K, ones_K = logprobs_K.double(), torch.ones(len(logprobs_K), dtype=torch.float64)
        return cls(
            logprobs_K=logprobs_K,
            entropies_K=entropies_K.double(),
            old_logprobs_K=logprobs_K,
            reference_logprobs_K=None if reference_logprobs_K is None else reference_logprobs_K.double(),
            mask_K=ones_K,
            offsets_N1=offsets_N1,
            advantages_N=advantages_PG.double().flatten(),
            rewards_N=rewards_PG.double().flatten(),
            prompts_N=torch.arange(P).repeat_interleave(G),
            weights_N=torch.ones(P * G, dtype=torch.float64),
            responses=P * G,
            max_new_tokens=max_new_tokens,
            kl_beta=kl_beta,
        )

    @property
    def lengths_N(self) -> Tensor:
        """T: how many tokens of each response count, float64 [N]."""
        return ragged.sequence_sum(self.mask_K, self.offsets_N1)

    def sequence_sum(self, values_K: Tensor) -> Tensor:
        """Σ_k x_k over the tokens of each response that count, float64 [N]."""
        return ragged.sequence_sum(self.mask_K * values_K, self.offsets_N1)

    def of_tokens(self, values_N: Tensor) -> Tensor:
        """What holds for a response, for each of its tokens, [K]."""
        return torch.repeat_interleave(values_N, ragged.lengths(self.offsets_N1))

    def mean(self, values_N: Tensor) -> Tensor:
        """(1/N) Σ_i w_i x_i over the responses: the way from responses to one number, where the weights enter."""
        return (self.weights_N * values_N).sum() / self.responses


LossFunction = Callable[[LossBatch], Tensor]
"""The loss of a batch: a float64 scalar, differentiable twice."""


def kl(batch: LossBatch) -> Tensor:
    """Per-token estimate of KL(π‖π_ref), nats, [K]: e^(ℓ_ref−ℓ) − (ℓ_ref−ℓ) − 1, the k3 of Schulman, "Approximating KL
    divergence" (2020), as TRL's GRPOTrainer has it; 0 without a reference."""
    if batch.reference_logprobs_K is None:
        return torch.zeros_like(batch.logprobs_K)
    log_ratio_K = batch.reference_logprobs_K - batch.logprobs_K
    return log_ratio_K.expm1() - log_ratio_K


def policy_gradient(batch: LossBatch) -> Tensor:
    """x_k = −A·π/π_old + β·kl of every token, [K]."""
    ratio_K = (batch.logprobs_K - batch.old_logprobs_K).exp()
    return -batch.of_tokens(batch.advantages_N) * ratio_K + batch.kl_beta * kl(batch)


def grpo(batch: LossBatch) -> Tensor:
    """Group relative policy optimisation, arXiv:2402.03300, eq. 3: each response averages over its own tokens."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch)) / batch.lengths_N.clamp_min(1))


def dr_grpo(batch: LossBatch) -> Tensor:
    """GRPO done right, arXiv:2503.20783: a constant in the place of the length."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) / batch.max_new_tokens


def dapo(batch: LossBatch) -> Tensor:
    """DAPO, arXiv:2503.14476, eq. 8: all tokens of the batch count alike."""
    return batch.mean(batch.sequence_sum(policy_gradient(batch))) / batch.mean(batch.lengths_N)


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
