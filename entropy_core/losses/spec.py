"""Which loss the step is taken on, and every setting of the trainer that changes it."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from entropy_core.numerics.advantages import Aggregation, group_advantages, standardised
from entropy_core.numerics.clipping import OffPolicy
from entropy_core.numerics.loss_batch import LossBatch, Objective, micro_batches
from entropy_core.store.columns import TokenTable


class LossSpec(BaseModel):
    """A loss with its settings: all of it is part of the key of a step. Names are TRL's where TRL has the setting.

    Attributes:
        name: of the loss; of a user's `file.py:function`, the function alone.
        source: digest of the file that defines it; empty for a loss of this package.
        imports: digests of the modules beside that file that it imports, by their paths relative to it.
        scale_rewards: the standard deviation that advantages are divided by.
        max_new_tokens: where responses are cut; the constant length of `dr_grpo`.
        kl_beta: β of the KL term; 0 for none.
        kl_in: `loss`, or `reward`: then −β Σ_k (ℓ_k − ℓ_ref,k) is added to the reward of a response instead.
        use_bias_correction_kl, importance_sampling_level, top_entropy_quantile, entropy_coef: see `Objective`.
        epsilon_high: cap of the weights of `cispo`; 0 for none.
        multi_objective_aggregation: normalize_then_sum: rewards are sums of what was normalised within groups.
        reward_clip_range: lower and upper bound of rewards; empty for none.
        normalize_advantages: advantages are standardised over the batch, after everything else.
        mask_truncated_completions: responses that were cut do not count in the loss, but in the advantages of others.
        off_policy: ε, ε_high, δ and threshold of `OffPolicy`, for a U whose recorded ratios are not 1; empty: none.
        micro_batch: responses in a micro-batch of the trainer; 0: all are in one.
        seed: of the order in which responses come into micro-batches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    source: str = ""
    imports: dict[str, str] = Field({})
    scale_rewards: Literal["group", "batch", "none"]
    max_new_tokens: int = Field(ge=1)
    kl_beta: float = Field(0.0, ge=0)
    kl_in: Literal["loss", "reward"] = "loss"
    use_bias_correction_kl: bool = False
    importance_sampling_level: Literal["token", "sequence"] = "token"
    top_entropy_quantile: float = Field(1.0, gt=0, le=1)
    entropy_coef: float = 0.0
    epsilon_high: float = Field(0.0, ge=0)
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    reward_clip_range: list[float] = Field([], max_length=2)
    normalize_advantages: bool = False
    mask_truncated_completions: bool = False
    off_policy: list[float | None] = Field([], max_length=4)
    micro_batch: int = Field(0, ge=0)
    seed: int = 0

    @property
    def objective(self) -> Objective:
        """What the losses of this package go by."""
        return Objective(
            kl_beta=self.kl_beta if self.kl_in == "loss" else 0.0,
            kl_correction=self.use_bias_correction_kl,
            importance_sampling_level=self.importance_sampling_level,
            top_entropy_quantile=self.top_entropy_quantile,
            entropy_coef=self.entropy_coef,
            epsilon_high=self.epsilon_high or None,
            off_policy=OffPolicy(*self.off_policy) if self.off_policy else None,  # type: ignore[arg-type]
        )

    @property
    def averages_micro_batches(self) -> bool:
        """Whether a trainer that accumulates gradients gets another one than from all responses at once."""
        return bool(self.source or self.entropy_coef) or self.name == "bnpo" or self.top_entropy_quantile < 1

    @property
    def reward_column(self) -> str:
        """The column of the rewards that advantages are made of."""
        return "reward" if self.multi_objective_aggregation == "sum_then_normalize" else "normalised_reward"

    @property
    def rule_of_advantages(self) -> tuple[object, ...]:
        """What the advantages are made of rewards by."""
        kl = self.kl_beta if self.kl_in == "reward" else 0.0
        of_rewards = self.multi_objective_aggregation, tuple(self.reward_clip_range), self.normalize_advantages
        return self.name, self.source, self.scale_rewards, kl, of_rewards

    def batch(
        self, tokens: TokenTable, rewards_PG: Tensor, truncated_N: Tensor, recorded_PG: Tensor | None = None
    ) -> LossBatch:
        """U as the loss sees it, at the policy that scored it.

        Args:
            tokens: logprobs and entropies, nats; reference_logprobs with a KL term; old_logprobs, where they are not
                those of the policy.
            rewards_PG: float64 [P, G], of `reward_column`; NaN for a response without a reward, which counts with
                advantage 0.
            truncated_N: bool [N], whether a response was cut.
            recorded_PG: the trainer's own advantages, float64 [P, G]; None where they are computed.

        Returns:
            The batch, with the advantages that the trainer would compute, or has computed.
        """
        counts_N = ~truncated_N if self.mask_truncated_completions else torch.ones_like(truncated_N)
        mask_K = torch.repeat_interleave(counts_N, tokens.offsets_N1.diff()).double()
        # a loss of the user is given the advantages of GRPO, divided or not as the configuration says
        rule = "grpo" if self.source else self.name
        plain = LossBatch.on_policy(
            tokens["logprobs"],
            tokens["entropies"],
            tokens.offsets_N1,
            rewards_PG.nan_to_num(nan=0.0),
            rewards_PG.nan_to_num(nan=0.0),
            max_new_tokens=self.max_new_tokens,
            reference_logprobs_K=tokens.columns.get("reference_logprobs"),
            mask_K=mask_K,
            micro_batches_N=micro_batches(rewards_PG.numel(), self.micro_batch, self.seed),
            objective=self.objective,
        )
        if "old_logprobs" in tokens.columns:
            plain = replace(plain, old_logprobs_K=tokens["old_logprobs"].double())
        if recorded_PG is not None:
            return plain.with_advantages(recorded_PG)
        scored_PG = rewards_PG.clamp(*self.reward_clip_range) if self.reward_clip_range else rewards_PG
        if self.kl_beta and self.kl_in == "reward" and plain.reference_logprobs_K is not None:
            kl_N = plain.sequence_sum(plain.logprobs_K - plain.reference_logprobs_K)
            scored_PG = scored_PG - self.kl_beta * kl_N.view_as(rewards_PG)
        in_groups = self.multi_objective_aggregation == "sum_then_normalize"
        advantages_PG = group_advantages(scored_PG, rule, self.scale_rewards) if in_groups else scored_PG
        if self.normalize_advantages or not in_groups:
            advantages_PG = standardised(advantages_PG)
        return plain.with_advantages(advantages_PG.nan_to_num(nan=0.0))
