"""half-steps-u: the effect on the entropy of the steps on halves of U, from which follows how it varies with U."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep, moved_parameters, with_zeros
from entropy_core.losses.apart import coefficients_of_each
from entropy_core.losses.files import name_of, read_batch, read_parts
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.half_gradients import multiple, rest
from entropy_core.numerics.half_samples import balanced_halves
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.vectors import Block, Lazy, blocks_of, global_norm, in_blocks, times
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.loss_gradient import add_loss_gradient
from entropy_core.sequences.processor import processor_of

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
    Only the inner products are kept. Each split costs a backward pass over half of U, or over all of it where the loss
    is not additive over prompts (see `half_gradients`), and memory for one gradient. A split is left out where the loss
    has no finite gradient on one of its halves.

    Args:
        out: writer of `halves.parquet`: a row for each half of each split, with the number of its `prompts`, the
            `clip_factor` of its gradient, and `inner_product_…` for both normalisations, in nats per unit step.
        execution: device and micro-batch.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        Summary: the number of splits that are kept; whether the optimizer has made no step yet; and why its rule allows
        no interval over U, empty if it may.
    """
    processor, settings = processor_of(policy, execution), update.summary
    model, shards = processor.policy, [read_sequences(shard) for shard in sequences]
    parameters, device_of, of_u = model.named_parameters(), model.device_of, tokens_of(shards)
    first_RP = balanced_halves(settings["prompts"])
    parts_P = [part_P for row_P in first_RP for part_P in (row_P, ~row_P)]
    loss = name_of(execution, settings["loss"]["name"], settings["loss"]["source"])
    found = coefficients_of_each(loss, read_parts(update, of_u, parts_P), execution.isolation)
    _, of_whole = read_batch(update, of_u)
    tokens_P = of_u.offsets_N1.diff().view(settings["prompts"], -1).sum(1)

    stored = update.vector("gradient")
    whole = Lazy(blocks_of(parameters), lambda block: stored.block(block).to(device_of[block.name]).double())
    accumulated = model.new_accumulator(moved_parameters(checkpoint))

    def gradient_of(coefficients: TokenPair) -> Lazy[Block]:
        """The gradient of the loss, until the next one is asked for: there is memory for one."""
        for total in accumulated.values():
            total.zero_()
        add_loss_gradient(accumulated, processor, shards, coefficients)
        return in_blocks(with_zeros(accumulated, parameters))

    def gradients(mine_K: Tensor, pairs: Sequence[TokenPair]) -> Iterator[list[Lazy[Block]]]:
        """The gradients on both halves of a split, whose first has these tokens: together, or one by one."""
        ours = [TokenPair(*(values_K[chosen_K] for values_K in of_whole)) for chosen_K in (mine_K, ~mine_K)]
        factors = [multiple(*both) for both in zip(pairs, ours, strict=True)]
        if None in factors:
            for chosen_K, pair in zip((mine_K, ~mine_K), pairs, strict=True):
                yield [gradient_of(_spread(pair, chosen_K))]
        else:
            first = gradient_of(_spread(ours[0], mine_K))
            both = first, rest(whole, first, model.dtype)
            yield [times(factor, part) for factor, part in zip(factors, both, strict=True) if factor is not None]

    halves, state = gradient.summary["halves"], OptimizerStep(checkpoint, execution, parameters, whole, 1.0)
    covectors = [[gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS]

    def steps(parts: Sequence[Lazy[Block]]) -> list[dict[str, float]]:
        """The columns that the step on each of these gradients has."""
        clips = [clip_factor(global_norm(g), settings["max_grad_norm"]) for g in parts]
        directions = [state.on(g, clip).part("direction") for g, clip in zip(parts, clips, strict=True)]
        products = torch.zeros(len(parts), len(KINDS), dtype=torch.float64)
        for block in whole:  # v is not kept
            v = [direction[block] for direction in directions]
            for kind, of_halves in enumerate(covectors):
                dH = of_all(halves, [file.block(block).to(device_of[block.name]).double() for file in of_halves])
                products[:, kind] += torch.stack([(of_half * dH).sum() for of_half in v]).cpu()
        inner = [by_normalization(list(row), *entropy_and_length(halves)) for row in products]
        return [
            {"clip_factor": clip} | {f"inner_product_{normalization}": float(x) for normalization, x in of_half.items()}
            for clip, of_half in zip(clips, inner, strict=True)
        ]

    rows = []
    for split, first_P in enumerate(first_RP):
        first, second = found[2 * split : 2 * split + 2]
        if first is None or second is None:
            continue  # as where a loss divides by the number of tokens that count, and in a half none does
        mine_K = first_P.repeat_interleave(tokens_P)
        columns = [of_half for parts in gradients(mine_K, (first, second)) for of_half in steps(parts)]
        for part_P, of_half in zip((first_P, ~first_P), columns, strict=True):
            rows.append({"split": split, "prompts": int(part_P.sum())} | of_half)
    names = [f"inner_product_{normalization}" for normalization in ("per_token", "per_sequence")]
    kinds = {"split": pa.int64(), "prompts": pa.int64()} | dict.fromkeys(("clip_factor", *names), pa.float64())
    out.table(pa.Table.from_pylist(rows, schema=pa.schema(kinds)), "halves.parquet")
    return {
        "splits": len(rows) // 2,
        "fresh": not checkpoint.summary["optimizer"],
        "no_interval": checkpoint.summary["no_interval"],
    }


def _spread(of_some: TokenPair, chosen_K: Tensor) -> TokenPair:
    """Coefficients of all tokens of U, from those of some; 0 for the others."""
    zeros_K = torch.zeros(len(chosen_K), dtype=torch.float64)
    return TokenPair(*(zeros_K.masked_scatter(chosen_K, values_K) for values_K in of_some))
