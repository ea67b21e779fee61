"""compute-update: the step v that the optimizer would take on U, and the gradient that it is made of."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from entropy_core.errors import NonFiniteError
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.advantages import (
    Loss,
    Scaling,
    group_advantages,
    kl_coefficients,
    loss_coefficients,
    token_weights,
)
from entropy_core.numerics.vectors import each, global_norm, in_blocks, squares
from entropy_core.optimizer_step import OptimizerStep
from entropy_core.policy import Coefficients
from entropy_core.stages.columns import read_columns
from entropy_core.stages.sequences import Law, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def compute_update(
    out: "Writer",
    execution: "Execution",
    *,
    law: Law,
    checkpoint: "Artifact",
    sequences: "Sequence[Artifact]",
    rewards: "Artifact",
    scores: "Sequence[Artifact]",
    reference: "Sequence[Artifact]",
    kl_beta: float,
    responses_per_prompt: int,
    loss: Loss,
    scale_rewards: Scaling,
    max_new_tokens: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Gradient of the loss on U, then the next AdamW step per unit of learning rate.

    Args:
        out: the vectors `direction` (v) and `gradient` (of the loss, not clipped), by parameter name;
            `coefficients.safetensors` (the weight of each token's ℓ in the loss, at the on-policy point);
            `sequences.parquet` (reward, advantage).
        execution: device and micro-batch.
        law: the policy.
        checkpoint: artifact of load-checkpoint.
        sequences: the shards of sample-u-batch.
        rewards: artifact of reward-u-batch.
        scores: the shards of score-u-batch.
        reference: the shards of score-u-reference; none without a KL term.
        kl_beta: β of the KL term.
        responses_per_prompt: G.
        loss: the objective.
        scale_rewards: whether advantages are divided by the standard deviation of their group.
        max_new_tokens: the constant length of `dr_grpo`.
        max_grad_norm: of the clipping; 0 for none.

    Returns:
        Norms, clip factor, and how many prompts had equal rewards.
    """
    processor = processor_of(law, execution)
    policy = processor.policy
    rewards_N = torch.tensor(rewards.table("rewards.parquet")["reward"].to_pylist(), dtype=torch.float64)
    rewards_PG = rewards_N.view(-1, responses_per_prompt)
    advantages_PG = group_advantages(rewards_PG, loss, scale_rewards)
    shards = [read_sequences(shard) for shard in sequences]
    lengths_N = torch.cat([shard.lengths_N for shard in shards])
    coefficients_N = loss_coefficients(advantages_PG.flatten(), lengths_N, loss, max_new_tokens)
    coefficients_K = torch.repeat_interleave(coefficients_N, lengths_N)
    if reference:
        weights_K = torch.repeat_interleave(token_weights(lengths_N, loss, max_new_tokens), lengths_N)
        logprobs_K, reference_K = (read_columns(s, "logprobs")[0]["logprobs"] for s in (scores, reference))
        coefficients_K = coefficients_K + kl_beta * weights_K * kl_coefficients(logprobs_K, reference_K)

    gradient = policy.new_accumulator()
    start = 0
    for shard in shards:
        stop = start + len(shard.response_tokens_K)
        for index_K, rows in processor.micro_batches(shard):
            weights = Coefficients(coefficients_K[start:stop][index_K], torch.zeros(len(index_K), dtype=torch.float64))
            policy.add_gradients(rows, [weights], law["temperature"], [gradient])
        start = stop
    g = in_blocks(gradient)
    norm = global_norm(g)
    if not math.isfinite(norm):
        raise NonFiniteError(
            "the gradient on U is not finite", cause="the weights hold a NaN", way_out="check the checkpoint"
        )
    clip = clip_factor(norm, max_grad_norm)
    step = OptimizerStep(checkpoint, execution, policy.named_parameters(), g, clip)
    shapes, dtype = {name: tuple(t.shape) for name, t in gradient.items()}, getattr(torch, law["dtype"])
    of_direction = []
    with out.vector("direction", shapes, dtype) as direction, out.vector("gradient", shapes, dtype) as loss_gradient:
        for block, v in zip(step, each(lambda block: step[block].direction, step), strict=True):
            of_direction.append(squares(v))
            direction.write(block, v)
            loss_gradient.write(block, g[block])
    out.tensors({"coefficients": coefficients_K}, "coefficients.safetensors")
    table = rewards.table("rewards.parquet")
    table = table.append_column("advantage", pa.array(advantages_PG.flatten().tolist()))
    out.table(table.append_column("length", pa.array(lengths_N.tolist())), "sequences.parquet")
    return {
        "gradient_norm": norm,
        "clip_factor": clip,
        "max_grad_norm": max_grad_norm,
        "update_norm": sum(of_direction) ** 0.5,
        "prompts": len(advantages_PG),
        "prompts_with_equal_rewards": int((rewards_PG.amax(dim=1) == rewards_PG.amin(dim=1)).sum()),
        "loss": loss,
        "kl_beta": kl_beta,
        "mean_reward": float(rewards_N.mean()),
    }
