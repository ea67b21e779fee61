"""The exact next step of the optimizer on a changed loss, with changed hyperparameters, clipping and moments."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep, moved_parameters, with_zeros
from entropy_core.losses.changed import Changed
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.rounded_step import rounded_clip_factor
from entropy_core.numerics.vectors import Block, global_norm, in_blocks
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.loss_gradient import add_loss_gradient
from entropy_core.sequences.processor import SequenceProcessor

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact


class ChangedStep(NamedTuple):
    """v' per unit of the nominal learning rate, computed block by block, and what clipping did to its gradient."""

    step: OptimizerStep
    rounded_clip: float
    gradient_norm: float
    clip_factor: float

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Yield v' block by block, float64, with the rounding of weights that the trainer keeps in a narrow dtype."""
        yield from self.step.taken(self.rounded_clip).items()


def changed_step(
    changed: Changed,
    processor: SequenceProcessor,
    shards: Sequence[BatchedSequences],
    checkpoint: "Artifact",
    max_grad_norm: float,
    execution: "Execution",
) -> ChangedStep:
    """Take the step on U under an intervention; costs a backward pass over U.

    Args:
        changed: the changed loss and hyperparameters.
        processor: the policy that sampled U.
        shards: the sequences of U.
        checkpoint: artifact of load-checkpoint.
        max_grad_norm: of the run, unless the intervention changes it.
        execution: knows where `optimizer.pt` is.

    Returns:
        The step.
    """
    model, moving = processor.policy, moved_parameters(checkpoint)
    accumulated = model.new_accumulator(moving)
    add_loss_gradient(accumulated, processor, shards, changed.coefficients)
    gradient = with_zeros(accumulated, model.named_parameters())
    g = in_blocks(gradient)
    largest = changed.altered.max_grad_norm
    max_norm = max_grad_norm if largest is None else largest
    norm = global_norm(g)
    clip = clip_factor(norm, max_norm)
    step = OptimizerStep(checkpoint, execution, model.named_parameters(), g, clip, changed.altered)
    narrow = step.narrow
    rounded_clip = rounded_clip_factor(
        ((gradient[name], narrow.get(name, torch.float32)) for name in moving), max_norm if narrow else 0.0
    )
    return ChangedStep(step, rounded_clip, norm, clip)
