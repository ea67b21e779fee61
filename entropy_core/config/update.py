"""What a user says of the step: the loss, the rewards, and the settings that no checkpoint records."""

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from entropy_core.config.paths import (
    FunctionName,
    FunctionNames,
    ModelName,
)
from entropy_core.config.phase import PhaseConfig
from entropy_core.config.section import Section
from entropy_core.numerics.advantages import Aggregation, Loss, Scaling


class UpdateConfig(Section):
    """The optimizer step whose effect is predicted: that of your trainer."""

    loss: FunctionName = Field(
        "grpo",
        min_length=1,
        description=f"Objective: {', '.join(get_args(Loss))}, or your own, `file.py:function` or "
        "`package.module:function`.",
        json_schema_extra={"pattern": f"^({'|'.join(get_args(Loss))})$|:"},
    )
    scale_rewards: Scaling = Field(
        "auto",
        description="What advantages are divided by: the standard deviation of their group, that of all rewards of U "
        "(batch), or none. auto: as the loss was published (dr_grpo, rloo and reinforce do not divide). TRL's trainer "
        "divides under any loss: group. A loss of your own needs another one than auto.",
    )
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Global-norm gradient clipping; 0 switches it off.")
    learning_rate: float = Field(
        0.0, ge=0, le=10, description="Nominal learning rate; 0: the one saved in the checkpoint."
    )
    optimizer_state: Literal["checkpoint", "fresh"] = Field(
        "checkpoint",
        description="Adam's moments: those of `optimizer.pt`, or none yet (fresh: before the first step; needs "
        "`learning_rate`).",
    )
    kl_beta: float = Field(0.0, ge=0, le=1000, description="β of a KL term to a reference policy; 0: none.")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="Where the KL term is: in the loss, per token, or in the reward of a response (TRL's RLOO)."
    )
    use_bias_correction_kl: bool = Field(
        False,
        description="The KL term of a token is multiplied by its importance ratio, so that its gradient is that of the "
        "KL divergence, as TRL does by default.",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one importance ratio for a whole response (GSPO)."
    )
    top_entropy_quantile: float = Field(
        1.0, gt=0, le=1, description="Share of the tokens, those of the highest entropy, that have a policy term."
    )
    entropy_coef: float = Field(
        0.0,
        ge=-100,
        le=100,
        description="Coefficient of an entropy bonus; an adaptive one: as of the next step.",
    )
    epsilon_high: float = Field(0.0, ge=0, le=1e6, description="Cap of the weights of cispo; 0: none.")
    reward_clip_range: list[Annotated[float, Field(ge=-1e9, le=1e9)]] = Field(
        default_factory=list, max_length=2, description="Lower and upper bound that rewards are clipped to; []: none."
    )
    normalize_advantages: bool = Field(
        False, description="Advantages are standardised over all of U in the end, as TRL's RLOO can."
    )
    mask_truncated_completions: bool = Field(
        False, description="Responses that were cut at `max_new_tokens` do not count in the loss."
    )
    micro_batch: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Responses in a micro-batch of the trainer, if it accumulates gradients: bnpo, an entropy bonus, "
        "top_entropy_quantile and a loss of your own average over each of them. 0: all are in one.",
    )
    reference: ModelName = Field(
        "",
        description="Reference policy, its directory or its name in the hub cache; empty: the base under an adapter.",
    )
    reward: FunctionNames = Field(
        "exact_match",
        description="A known reward, `package.module:function`, or `file.py:function`; or a list of these, whose "
        "weighted sum is the reward.",
    )
    reward_weights: list[Annotated[float, Field(ge=-1e9, le=1e9)]] = Field(
        default_factory=list, max_length=100, description="Weights of several rewards, in their order; []: all 1."
    )
    multi_objective_aggregation: Aggregation = Field(
        "sum_then_normalize",
        description="Several rewards are summed, and the sum makes the advantages; or each is normalised within its "
        "group first, and the sum over the batch then (normalize_then_sum).",
    )
    phase: PhaseConfig = PhaseConfig()
    leave_out: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=100,
        description="Settings of your trainer, by its own names, that the step here may leave out: what is not "
        "modelled is then warned of, and otherwise refused.",
    )

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards, one or several."""
        return (self.reward,) if isinstance(self.reward, str) else tuple(self.reward)

    @field_validator("loss")
    @classmethod
    def _is_known(cls, loss: str) -> str:
        if loss not in get_args(Loss) and ":" not in loss:
            raise ValueError(
                f"unknown loss {loss!r}. Use one of {', '.join(get_args(Loss))}, file.py:function, or "
                "package.module:function"
            )
        return loss

    @field_validator("scale_rewards")
    @classmethod
    def _within_groups(cls, scale_rewards: Scaling, info: ValidationInfo) -> Scaling:
        if scale_rewards == "group" and info.data.get("loss") == "reinforce":
            raise ValueError("reinforce compares no responses within a group. Set scale_rewards: auto")
        return scale_rewards

    @field_validator("reward_clip_range")
    @classmethod
    def _is_a_range(cls, reward_clip_range: list[float]) -> list[float]:
        if reward_clip_range and (len(reward_clip_range) != 2 or not reward_clip_range[0] < reward_clip_range[1]):
            raise ValueError("it must be a lower and a larger upper bound, or empty")
        return reward_clip_range

    @field_validator("optimizer_state")
    @classmethod
    def _with_a_learning_rate(cls, optimizer_state: str, info: ValidationInfo) -> str:
        if optimizer_state == "fresh" and info.data.get("learning_rate") == 0:
            raise ValueError("a fresh optimizer has no learning rate of its own. Set learning_rate to that of the run")
        return optimizer_state
