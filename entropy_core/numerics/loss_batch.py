"""What a loss is given: the update batch, token by token, and the settings of the trainer that it goes by."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_core.numerics import ragged


@dataclass(frozen=True)
class Objective:
    """What settings of a trainer change about a loss; the names are TRL's, and the defaults change nothing.

    Args:
        kl_beta: β of the KL term; 0 for none.
        kl_correction: kl_k is multiplied by ρ_k (`use_bias_correction_kl`), which makes its gradient on-policy that of
            the KL divergence, (ℓ − ℓ_ref)∇ℓ.
        importance_sampling_level: `sequence`: ρ is that of the whole response, exp(mean_k(ℓ_k − ℓ_old,k)), in each of
            its tokens (GSPO, arXiv:2507.18071).
        top_entropy_quantile: share of the tokens of a micro-batch whose x_k has a policy term, those of the highest
            entropy (arXiv:2506.01939).
        entropy_coef: of the bonus, the mean entropy over the tokens of a micro-batch that have a policy term.
        epsilon_high: cap of ρ̄ in `cispo`; None for no cap.
    """

    kl_beta: float = 0.0
    kl_correction: bool = False
    importance_sampling_level: Literal["token", "sequence"] = "token"
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    epsilon_high: float | None = None


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
        micro_batches_N: in which micro-batch of the trainer each response is, int64, from 0.
        objective: settings of the loss.
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
    micro_batches_N: Tensor
    objective: Objective

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
        mask_K: Tensor | None = None,
        micro_batches_N: Tensor | None = None,
        objective: Objective | None = None,
    ) -> "LossBatch":
        """U at the policy that sampled it, with every response counting once.

        Args:
            logprobs_K: ℓ, nats, [K].
            entropies_K: h, nats, [K].
            offsets_N1: int64 [N + 1], the responses to one prompt together.
            advantages_PG: of P prompts × G responses.
            rewards_PG: likewise.
            max_new_tokens: where a response is cut.
            reference_logprobs_K: ℓ_ref, nats, [K]; None without a KL term.
            mask_K: 1 for a token that counts; None for all.
            micro_batches_N: int64 [N]; None for one micro-batch.
            objective: settings of the loss; None for the plain one.

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
            mask_K=ones_K if mask_K is None else mask_K.double(),
            offsets_N1=offsets_N1,
            advantages_N=advantages_PG.double().flatten(),
            rewards_N=rewards_PG.double().flatten(),
            prompts_N=torch.arange(P).repeat_interleave(G),
            weights_N=torch.ones(P * G, dtype=torch.float64),
            responses=P * G,
            max_new_tokens=max_new_tokens,
            micro_batches_N=torch.zeros(P * G, dtype=torch.int64) if micro_batches_N is None else micro_batches_N,
            objective=objective or Objective(),
        )

    @property
    def kl_beta(self) -> float:
        """β of the KL term; 0 for none."""
        return self.objective.kl_beta

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

    def micro_mean(self, values_N: Tensor, counts_N: Tensor) -> Tensor:
        """The mean over micro-batches of Σ_i w_i x_i / Σ_i w_i n_i, the sums over the responses in each."""
        micro_batches = int(self.micro_batches_N.max()) + 1

        def summed(x_N: Tensor) -> Tensor:
            return x_N.new_zeros(micro_batches).index_add(0, self.micro_batches_N, self.weights_N * x_N)

        return (summed(values_N) / summed(counts_N).clamp_min(1)).mean()
