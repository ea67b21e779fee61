"""compute-update: the step v that the optimizer would take on U, and the gradient that it is computed from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch

from entropy_core.checkpoints.optimizer_step import moved_parameters
from entropy_core.losses.apart import token_coefficients
from entropy_core.losses.files import RECORDED, name_of, write_tokens
from entropy_core.losses.recorded import differences, recorded_advantages, with_recorded
from entropy_core.losses.sampled import sampled_batch
from entropy_core.losses.spec import LossSpec
from entropy_core.losses.taken_step import taken_step
from entropy_core.numerics.advantages import groups_of_equal
from entropy_core.numerics.vectors import squares
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import as_numbers

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Recorded, Rewards, ScoresOfReference, ScoresOfU, SequencesOfU


def compute_update(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    checkpoint: "Checkpoint",
    sequences: "Sequence[SequencesOfU]",
    rewards: "Rewards",
    scores: "Sequence[ScoresOfU]",
    reference: "Sequence[ScoresOfReference]",
    recorded: "Sequence[Recorded]",
    old_logprobs: Literal["recorded", "scored"],
    loss: LossSpec,
    responses_per_prompt: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Compute the gradient of the loss on U, then the optimizer's next step per unit of learning rate.

    Where the trainer keeps its weights in a narrow dtype, v is the change of the rounded weights over the learning
    rate: the trainer's own step, so that the measured change of the entropy tends to its first order.

    Args:
        out: receives the vectors `direction` (v) and `gradient` (of the loss, not clipped), by parameter name;
            `loss.safetensors` (the inputs of the loss for each token, and its derivatives ∂L/∂ℓ and ∂L/∂h);
            `sequences.parquet` (reward, advantage, length, and whether the response was cut).
        execution: device and micro-batch size.
        policy: the policy that sampled the sequences.
        checkpoint: artifact of load-checkpoint.
        sequences: shards of sample-u-batch, or recorded-u-batch.
        rewards: artifact of reward-u-batch, or recorded-u-batch.
        scores: shards of score-u-batch.
        reference: shards of score-u-reference; empty without a KL term, or where its reference was recorded.
        recorded: recorded-u-batch, whose advantages are used; empty where U was sampled.
        old_logprobs: whether the ratios of the loss are to recorded log-probabilities, where there are any.
        loss: the loss and its settings.
        responses_per_prompt: G, the number of responses to each prompt.
        max_grad_norm: global norm at which the gradient is clipped; 0 for no clipping.

    Returns:
        Norms of the gradient and the step, the clip factor, the share of the weights that move, the number of
        prompts whose responses had equal rewards, and how far what was recorded differs from what is computed.
    """
    processor = processor_of(policy, execution)
    shards, rewarded = [read_sequences(shard) for shard in sequences], rewards.table("rewards.parquet")
    table, rewards_PG, truncated_N = sampled_batch(loss, shards, rewards, scores, reference, responses_per_prompt)
    rewards_N = as_numbers(rewarded["reward"].to_pylist())
    lengths_N = torch.cat([shard.lengths_N for shard in shards])
    own_N: torch.Tensor | None = None
    differing: dict[str, Any] = {}
    for of_trainer in recorded:
        own_N = recorded_advantages(of_trainer)
        use_reference = bool(loss.kl_beta) and not reference
        table = with_recorded(table, of_trainer, old_logprobs == "recorded", use_reference)
        differing = differences(table, loss.batch(table, rewards_PG, truncated_N).advantages_N, own_N)
    batch = loss.batch(table, rewards_PG, truncated_N, None if own_N is None else own_N.view_as(rewards_PG))
    coefficients = token_coefficients(name_of(execution, loss.name, loss.source), batch, execution.isolation)

    found = taken_step(coefficients, processor, shards, checkpoint, execution, max_grad_norm)
    parameters = processor.policy.named_parameters()
    shapes, dtype = {name: tuple(p.shape) for name, p in parameters.items()}, getattr(torch, policy.dtype)
    moving = sum(parameters[name].numel() for name in moved_parameters(checkpoint))
    of_direction, changed = [], 0
    with out.vector("direction", shapes, dtype) as direction, out.vector("gradient", shapes, dtype) as loss_gradient:
        for block, v in found.blocks():
            of_direction.append(squares(v))
            changed += int(v.count_nonzero())
            direction.write(block, v)
            loss_gradient.write(block, found.gradient[block])
    write_tokens(out, table, coefficients)
    columns = {"advantage": batch.advantages_N, "length": lengths_N, "truncated": truncated_N}
    columns |= {} if own_N is None else {RECORDED: own_N}
    for name, column_N in columns.items():
        rewarded = rewarded.append_column(name, pa.array(column_N.tolist()))
    out.table(rewarded, "sequences.parquet")
    return {
        "gradient_norm": found.gradient_norm,
        "clip_factor": found.clip_factor,
        "max_grad_norm": max_grad_norm,
        "update_norm": sum(of_direction) ** 0.5,
        "moved_fraction": changed / moving,
        "rounded": found.step.rounds,
        "prompts": len(rewards_PG),
        "prompts_with_equal_rewards": groups_of_equal(rewards_N.view_as(rewards_PG)),
        "loss": loss.model_dump(),
        "mean_reward": float(rewards_N.nanmean()),
        "differing": differing,
    }
