"""Inputs of a loss: the update batch U token by token, and the trainer settings that change the loss."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.clipping import OffPolicy


@dataclass(frozen=True)
class Objective:
    """Trainer settings that change a loss, with TRL's names; the defaults change nothing. `losses` defines the symbols.

    Args:
        kl_beta: β of the KL term; 0 for no KL term.
        kl_correction: multiply kl_k by ρ_k (`use_bias_correction_kl` in TRL). On-policy, the gradient of the product is
            that of the KL divergence, (ℓ − ℓ_ref)∇ℓ.
        importance_sampling_level: `sequence` gives every token the ratio of its whole response,
            exp(mean_k(ℓ_k − ℓ_old,k)) (GSPO, arXiv:2507.18071).
        top_entropy_quantile: fraction of the tokens of a micro-batch, those with the highest entropy, that keep the
            policy term of x_k (arXiv:2506.01939).
        entropy_coef: coefficient of the entropy bonus, the mean entropy of the tokens that keep the policy term.
        epsilon_high: cap of ρ̄ in `cispo`; None for no cap.
        off_policy: what is done about ratios that are not 1; None: nothing, as on-policy it makes no difference.
    """

    kl_beta: float = 0.0
    kl_correction: bool = False
    importance_sampling_level: Literal["token", "sequence"] = "token"
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    epsilon_high: float | None = None
    off_policy: OffPolicy | None = None


def micro_batches(responses: int, size: int, seed: int) -> Tensor:
    """Shuffle responses and cut them into micro-batches, as a trainer does that accumulates gradients.

    Args:
        responses: how many.
        size: of a micro-batch; 0: all are in one.
        seed: of the order.

    Returns:
        Which micro-batch each response is in, int64 from 0.
    """
    return _places(responses, seed) // size if size else torch.zeros(responses, dtype=torch.int64)


def _places(responses: int, seed: int | None) -> Tensor:
    """Return the place of each response in a shuffled order, as TRL shuffles a rollout; None: as they are."""
    if seed is None:
        return torch.arange(responses)
    order_N = torch.randperm(responses, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(responses))


def minibatch(responses: int, count: int, index: int, micro_batch: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return the responses of one minibatch of a rollout, which is shuffled once and then cut.

    Args:
        responses: N, of the rollout; a multiple of `count`.
        count: number of minibatches.
        index: which minibatch, from 0.
        micro_batch: responses in a micro-batch; 0: all are in one.
        seed: of the order, that of `micro_batches`; None: as they are.

    Returns:
        Indices of the responses, rising, int64 [N / count]; and the index of each one's micro-batch, int64.
    """
    place_N, size = _places(responses, seed), responses // count
    chosen_M = (place_N // size == index).nonzero().squeeze(1)
    within_M = place_N[chosen_M] - index * size
    return chosen_M, within_M // micro_batch if micro_batch else torch.zeros_like(within_M)


@dataclass(frozen=True)
class LossBatch:
    """The update batch U as inputs of a loss: N responses with K tokens in total, stored flat.

    Response i has the tokens `offsets_N1[i]:offsets_N1[i + 1]`.

    Args:
        logprobs_K: ℓ, log-probability of each token, nats, float64; differentiable.
        entropies_K: h, full-softmax entropy at each token, nats, float64; differentiable.
        old_logprobs_K: ℓ_old under the policy that sampled U, nats, float64; equal to ℓ on-policy, but constant.
        reference_logprobs_K: ℓ_ref under the reference policy, nats, float64; None without a KL term.
        mask_K: 1 for a token that counts in the loss, else 0, float64.
        offsets_N1: int64 [N + 1].
        advantages_N: A of each response, float64.
        rewards_N: reward of each response, float64.
        prompts_N: index of the prompt in U that each response answers, int64, from 0.
        weights_N: weight of each response, float64, applied by `mean`; 1 unless an influence is computed.
        responses: number of responses drawn.
        max_new_tokens: length limit of a response.
        micro_batches_N: index of the trainer's micro-batch that holds each response, int64, from 0.
        objective: trainer settings that change the loss.
        rollout_length: mean number of tokens that count in a response of the whole rollout, of which this is a
            minibatch; None: this is all of it. `dapo` and `cispo` divide by it, as TRL does.
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
    rollout_length: float | None = None

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
        """Build U at the policy that sampled it, with a weight of 1 for every response.

        Args:
            logprobs_K: ℓ, nats, [K].
            entropies_K: h, nats, [K].
            offsets_N1: int64 [N + 1]; responses to the same prompt are adjacent.
            advantages_PG: A of G responses to each of P prompts, [P, G].
            rewards_PG: rewards, [P, G].
            max_new_tokens: length limit of a response.
            reference_logprobs_K: ℓ_ref, nats, [K]; None without a KL term.
            mask_K: 1 for a token that counts in the loss, else 0; None if all count.
            micro_batches_N: index of each response's micro-batch, int64 [N]; None for one micro-batch.
            objective: trainer settings that change the loss; None for the defaults.

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

    def with_advantages(self, advantages_PG: Tensor) -> "LossBatch":
        """The same with other advantages, float64 [P, G]."""
        return replace(self, advantages_N=advantages_PG.double().flatten())

    def select(self, chosen_M: Tensor) -> "LossBatch":
        """Return some of the responses as a batch of their own; what was computed from all of them stays as it is.

        Args:
            chosen_M: indices of the responses, int64, in any order; one may be chosen twice.

        Returns:
            The batch, with the advantages of the whole.
        """
        pick_K, reference_K = ragged.token_index(self.offsets_N1, chosen_M), self.reference_logprobs_K
        return replace(
            self,
            logprobs_K=self.logprobs_K[pick_K],
            entropies_K=self.entropies_K[pick_K],
            old_logprobs_K=self.old_logprobs_K[pick_K],
            reference_logprobs_K=None if reference_K is None else reference_K[pick_K],
            mask_K=self.mask_K[pick_K],
            offsets_N1=ragged.offsets_from_lengths(ragged.lengths(self.offsets_N1)[chosen_M]),
            advantages_N=self.advantages_N[chosen_M],
            rewards_N=self.rewards_N[chosen_M],
            prompts_N=self.prompts_N[chosen_M],
            weights_N=self.weights_N[chosen_M],
            responses=len(chosen_M),
            micro_batches_N=self.micro_batches_N[chosen_M],
        )

    @property
    def kl_beta(self) -> float:
        """β of the KL term; 0 for no KL term."""
        return self.objective.kl_beta

    @property
    def lengths_N(self) -> Tensor:
        """T, the number of tokens of each response that count, float64 [N]."""
        return ragged.sequence_sum(self.mask_K, self.offsets_N1)

    def sequence_sum(self, values_K: Tensor) -> Tensor:
        """Return Σ_k x_k over the tokens of each response that count, float64 [N]."""
        return ragged.sequence_sum(self.mask_K * values_K, self.offsets_N1)

    def of_tokens(self, values_N: Tensor) -> Tensor:
        """Repeat each response's value for all of its tokens, [K]."""
        return ragged.of_tokens(values_N, self.offsets_N1)

    def mean(self, values_N: Tensor) -> Tensor:
        """Return (1/N) Σ_i w_i x_i over the responses. A loss must reduce with it, because it applies the weights."""
        return (self.weights_N * values_N).sum() / self.responses

    def micro_mean(self, values_N: Tensor, counts_N: Tensor) -> Tensor:
        """Return the mean over micro-batches of Σ_i w_i x_i / Σ_i w_i n_i, summed over responses of the micro-batch."""
        micro_batches = int(self.micro_batches_N.max()) + 1

        def summed(x_N: Tensor) -> Tensor:
            return x_N.new_zeros(micro_batches).index_add(0, self.micro_batches_N, self.weights_N * x_N)

        return (summed(values_N) / summed(counts_N).clamp_min(1)).mean()
