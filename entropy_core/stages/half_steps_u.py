"""half-steps-u: the effect on the entropy of the steps on halves of U, from which follows how it varies with U."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep, moved_parameters, with_zeros
from entropy_core.losses.apart import coefficients_of_each
from entropy_core.losses.files import name_of, read_parts
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.half_samples import balanced_halves
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.vectors import global_norm, in_blocks
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import BatchedSequences, tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.loss_gradient import add_loss_gradient
from entropy_core.sequences.processor import SequenceProcessor, processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Gradient, SequencesOfU, Update


def half_steps_u(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
) -> dict[str, Any]:
    """Take the step again on each half of the prompts of U, for several splits, and compute ⟨∇H, v⟩ of each.

    What the trainer does to a batch is done to a half: advantages, denominators of the loss, clipping, both moments.
    Only the inner products are kept. Each split costs a backward pass over U, and memory for one gradient. A split is
    left out where the loss has no finite gradient on one of its halves.

    Args:
        out: writer of `halves.parquet`: a row for each half of each split, with the number of its `prompts`, the
            `clip_factor` of its gradient, and `inner_product_…` for both normalisations, in nats per unit step.
        execution: device and micro-batch.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update, of which no vector is read.
        gradient: artifact of entropy-gradient.

    Returns:
        Summary: the number of splits that are kept; whether the optimizer has made no step yet; and why its rule allows
        no interval over U, empty if it may.
    """
    processor, settings = processor_of(policy, execution), update.summary
    model, shards = processor.policy, [read_sequences(shard) for shard in sequences]
    first_RP = balanced_halves(settings["prompts"])
    parts_P = [part_P for row_P in first_RP for part_P in (row_P, ~row_P)]
    loss = name_of(execution, settings["loss"]["name"], settings["loss"]["source"])
    batches = read_parts(update, tokens_of(shards), parts_P)
    found = coefficients_of_each(loss, batches, execution.isolation)
    # as where a loss divides by the number of tokens that count, and in a half none does
    whole_R = [None not in found[i : i + 2] for i in range(0, len(found), 2)]

    halves, moving = gradient.summary["halves"], moved_parameters(checkpoint)
    covectors = [[gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS]
    rows = []
    for index, (part_P, of_tokens) in enumerate(zip(parts_P, found, strict=True)):
        if of_tokens is None or not whole_R[index // 2]:
            continue
        accumulated = model.new_accumulator(moving)
        _add_gradient(accumulated, processor, shards, part_P, of_tokens)
        g = in_blocks(with_zeros(accumulated, model.named_parameters()))
        clip = clip_factor(global_norm(g), settings["max_grad_norm"])
        step = OptimizerStep(checkpoint, execution, model.named_parameters(), g, clip)
        products = torch.zeros(len(KINDS), dtype=torch.float64)
        for block, v in step.part("direction").items():  # v is not kept
            for kind, of_halves in enumerate(covectors):
                dH = of_all(halves, [file.block(block).to(v.device).double() for file in of_halves])
                products[kind] += float((v * dH).sum())
        inner = by_normalization(list(products), *entropy_and_length(halves))
        columns = {f"inner_product_{normalization}": float(value) for normalization, value in inner.items()}
        rows.append({"split": index // 2, "prompts": int(part_P.sum()), "clip_factor": clip} | columns)
        del accumulated, g, step  # before the next accumulator, which takes 8 bytes per parameter
    names = [f"inner_product_{normalization}" for normalization in ("per_token", "per_sequence")]
    kinds = {"split": pa.int64(), "prompts": pa.int64()} | dict.fromkeys(("clip_factor", *names), pa.float64())
    out.table(pa.Table.from_pylist(rows, schema=pa.schema(kinds)), "halves.parquet")
    return {
        "splits": len(rows) // 2,
        "fresh": not checkpoint.summary["optimizer"],
        "no_interval": checkpoint.summary["no_interval"],
    }


def _add_gradient(
    into: dict[str, Tensor],
    processor: SequenceProcessor,
    shards: Sequence[BatchedSequences],
    part_P: Tensor,
    coefficients: TokenPair,
) -> None:
    """Add the gradient of the loss on some of the prompts, whose tokens have these coefficients."""
    responses = sum(len(shard) for shard in shards) // len(part_P)
    mine_N = part_P.repeat_interleave(responses)
    of_shards = zip(shards, mine_N.split([len(shard) for shard in shards]), strict=True)
    chosen = (shard.select(mine_B.nonzero().squeeze(1)) for shard, mine_B in of_shards)
    add_loss_gradient(into, processor, chosen, coefficients)
