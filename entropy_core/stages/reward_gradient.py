"""reward-gradient: gradient of the expected reward (∇J) on each half of E, by backward passes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.errors import RewardError
from entropy_core.numerics.functional import REWARD
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.functional_gradient import functional_gradients, scored_batch
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import RewardsOfE, ScoresOfE, SequencesOfE


def reward_gradient(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    scores: "Sequence[ScoresOfE]",
    rewards: "Sequence[RewardsOfE]",
    responses_per_prompt: int,
) -> dict[str, Any]:
    """Compute the gradient of the expected reward, in the way of entropy-gradient and on the same halves of E.

        ∇J = (1/N) Σ_i Σ_k (r_i − b_k)∇ℓ_k

    Args:
        out: writer of the vectors `reward_0` and `reward_1`, by parameter name.
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: shards of sample-e-batch.
        scores: shards of score-e-batch, in the same order.
        rewards: shards of reward-e-batch, in the same order.
        responses_per_prompt: as in entropy-gradient.

    Returns:
        Summary: number of sequences of each half.

    Raises:
        RewardError: a response has no reward.
    """
    if without := sum(shard.summary["open"] for shard in rewards):
        raise RewardError(
            f"{without} responses of E have no reward, so that there is no expected reward",
            cause="every function returned None for them",
            fix="leave out price, or give every response a reward",
        )
    processor, dtype = processor_of(policy, execution), getattr(torch, policy.dtype)
    e_batch = scored_batch(sequences, scores, rewards)
    half_N = e_batch.ids_N // responses_per_prompt % 2
    gradients = functional_gradients(processor, e_batch, [REWARD], [half_N == half for half in HALVES])
    for half in HALVES:
        gradient = next(gradients)
        with out.vector(f"reward_{half}", {name: tuple(g.shape) for name, g in gradient.items()}, dtype) as file:
            for block, values in in_blocks(gradient).items():
                file.write(block, values)
        del gradient, values  # before the next accumulator, which takes 8 bytes per parameter
    return {"halves": [{"sequences": int((half_N == half).sum())} for half in HALVES]}
