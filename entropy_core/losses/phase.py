"""The minibatches of a rollout, each as its loss sees it: at a policy that has moved since the rollout."""

from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.clipping import OffPolicy
from entropy_core.numerics.loss_batch import LossBatch, minibatch


class PhaseSpec(BaseModel):
    """How the steps on one rollout are taken: all of it is part of the keys of these steps.

    Attributes:
        minibatches: M, into how many the rollout is cut.
        shuffle_seed: of the order in which it is cut; None: as it was drawn.
        epsilon, epsilon_high, delta, off_policy_mask_threshold: see `OffPolicy`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    minibatches: int = Field(ge=1)
    shuffle_seed: int | None
    epsilon: float = Field(ge=0)
    epsilon_high: float = Field(ge=0)
    delta: float | None = None
    off_policy_mask_threshold: float | None = None

    @property
    def off_policy(self) -> OffPolicy:
        """What is done about ratios that are not 1."""
        return OffPolicy(self.epsilon, self.epsilon_high, self.delta, self.off_policy_mask_threshold)


def minibatch_of(rollout: LossBatch, loss: LossSpec, phase: PhaseSpec, index: int) -> tuple[LossBatch, Tensor]:
    """Cut one minibatch out of a rollout.

    Args:
        rollout: U, at the policy that drew it.
        loss: the loss, whose micro-batches are cut from the minibatch.
        phase: how the rollout is cut, and its ratios are clipped.
        index: which minibatch, from 0.

    Returns:
        The minibatch, with ℓ and h of the rollout and the advantages that the whole rollout has; and the indices of its
        responses, rising, int64.
    """
    chosen_M, micro_batches_M = minibatch(
        rollout.responses, phase.minibatches, index, loss.micro_batch, phase.shuffle_seed
    )
    part = rollout.select(chosen_M)
    return replace(
        part,
        micro_batches_N=micro_batches_M,
        objective=replace(part.objective, off_policy=phase.off_policy),
        rollout_length=float(rollout.mean(rollout.lengths_N)),
    ), chosen_M
