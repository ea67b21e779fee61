"""dropout-u: how far the step is from one that a trainer takes with dropout on, which is off in all other passes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from entropy_core.checkpoints.optimizer_step import OptimizerStep, moved_parameters, with_zeros
from entropy_core.losses.files import read_batch
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.vectors import Lazy, blocks_of, global_norm, in_blocks, squares
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.loss_gradient import add_loss_gradient
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Gradient, SequencesOfU, Update


def dropout_u(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
    draws: int,
) -> dict[str, Any]:
    """Take the step again with dropout on, for several draws of its masks, and compare it with the step without.

    A trainer's step has one draw. The responses, their advantages and the coefficients of the loss are the same; only
    the gradient of ℓ and h is that of a network with dropout. Each draw costs a forward and a backward pass over U.

    Args:
        out: writer of `draws.parquet`, a row per draw: `relative_difference`, ‖v_draw − v‖/‖v‖, and for both
            normalisations `inner_product_…`, ⟨∇H, v_draw⟩, and `without_…`, ⟨∇H, v⟩, in nats per unit step.
        execution: device and micro-batch.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.
        draws: number of draws.

    Returns:
        Summary: `relative_differences` of the draws, and `changes`, that of ⟨∇H, v⟩ per token by each. The
        rounding of narrow weights is in neither step.
    """
    processor, settings = processor_of(policy, execution), update.summary
    model, shards = processor.policy, [read_sequences(shard) for shard in sequences]
    parameters, moving = model.named_parameters(), moved_parameters(checkpoint)
    _, coefficients = read_batch(update, tokens_of(shards))
    stored = update.vector("gradient")
    without = Lazy(blocks_of(parameters), lambda block: stored.block(block).to(model.device_of[block.name]).double())
    plain = OptimizerStep(checkpoint, execution, parameters, without, settings["clip_factor"])
    halves = gradient.summary["halves"]
    covectors = [[gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS]

    def taken(draw: int) -> dict[str, float]:
        accumulated = model.new_accumulator(moving)
        with model.dropout(seed=draw):
            add_loss_gradient(accumulated, processor, shards, coefficients)
        g = in_blocks(with_zeros(accumulated, parameters))
        step = plain.on(g, clip_factor(global_norm(g), settings["max_grad_norm"]))
        apart = whole = 0.0
        products = torch.zeros(2, len(KINDS), dtype=torch.float64)  # of this step, and of the plain one
        directions = step.part("direction"), plain.part("direction")
        for block in without:
            both = tuple(direction[block] for direction in directions)
            apart, whole = apart + squares(both[0] - both[1]), whole + squares(both[1])
            for kind, of_halves in enumerate(covectors):
                dH = of_all(halves, [file.block(block).to(model.device_of[block.name]).double() for file in of_halves])
                products[:, kind] += torch.stack([(v * dH).sum() for v in both]).cpu()
        found, off = (by_normalization(list(row), *entropy_and_length(halves)) for row in products)
        columns = {f"inner_product_{name}": float(value) for name, value in found.items()}
        columns |= {f"without_{name}": float(value) for name, value in off.items()}
        return {"relative_difference": (apart / whole) ** 0.5 if whole else 0.0} | columns

    rows = [taken(draw) for draw in range(draws)]
    out.table(pa.Table.from_pylist(rows), "draws.parquet")
    return {
        "relative_differences": [row["relative_difference"] for row in rows],
        "changes": [
            row["inner_product_per_token"] / row["without_per_token"] - 1 for row in rows if row["without_per_token"]
        ],
    }
