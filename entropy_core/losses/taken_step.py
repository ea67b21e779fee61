"""The exact next step of the optimizer on some coefficients of the tokens of U, with clipping and moments."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep, moved_parameters, with_zeros
from entropy_core.errors import NonFiniteError
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.rounded_step import rounded_clip_factor
from entropy_core.numerics.vectors import Block, Lazy, global_norm, in_blocks, squares
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.loss_gradient import add_loss_gradient
from entropy_core.sequences.processor import SequenceProcessor

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


class TakenStep(NamedTuple):
    """v per unit of the nominal learning rate, computed block by block, its gradient, and what clipping did to that.

    Args:
        step: the step of the optimizer.
        gradient: g before clipping, by block, float64.
        rounded_clip: factor that clips gradients of narrow dtypes.
        gradient_norm: ‖g‖.
        clip_factor: factor that g is scaled by.
    """

    step: OptimizerStep
    gradient: Lazy[Block]
    rounded_clip: float
    gradient_norm: float
    clip_factor: float

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Yield v block by block, float64, with the rounding of weights that the trainer keeps in a narrow dtype."""
        yield from self.step.taken(self.rounded_clip).items()


def taken_step(
    coefficients: TokenPair,
    processor: SequenceProcessor,
    shards: Sequence[BatchedSequences],
    checkpoint: "Artifact",
    execution: "Execution",
    max_grad_norm: float,
    altered: Altered = Altered(),  # noqa: B008 (immutable)
    earlier: "Artifact | None" = None,
) -> TakenStep:
    """Take the step on U at the processor's policy; costs a backward pass over the tokens with a coefficient.

    Args:
        coefficients: c_k and d_k of the loss, each float64 [K].
        processor: the policy.
        shards: the sequences of U.
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` is.
        max_grad_norm: global norm at which the gradient is clipped; 0 for no clipping.
        altered: hyperparameters in place of the run's; a norm among them goes before `max_grad_norm`.
        earlier: a step that was taken since the checkpoint, whose moments this one starts from.

    Returns:
        The step.

    Raises:
        NonFiniteError: the gradient is not finite.
    """
    model, moving = processor.policy, moved_parameters(checkpoint)
    gradient = model.new_accumulator(moving)
    add_loss_gradient(gradient, processor, shards, coefficients)
    return step_along(gradient, model, checkpoint, execution, max_grad_norm, altered, earlier)


def step_along(
    accumulated: dict[str, Tensor],
    model: Policy,
    checkpoint: "Artifact",
    execution: "Execution",
    max_grad_norm: float,
    altered: Altered,
    earlier: "Artifact | None" = None,
    state: OptimizerStep | None = None,
) -> TakenStep:
    """Take the step of the optimizer on a gradient.

    Args:
        accumulated: the gradient on U of the parameters that the trainer moves, float64.
        model: the policy.
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` is.
        max_grad_norm: as for `taken_step`.
        altered: as for `taken_step`.
        earlier: as for `taken_step`.
        state: of the optimizer, if it was read before.

    Returns:
        The step.

    Raises:
        NonFiniteError: the gradient is not finite.
    """
    gradient = with_zeros(accumulated, model.named_parameters())
    g = in_blocks(gradient)
    max_norm = max_grad_norm if altered.max_grad_norm is None else altered.max_grad_norm
    norm = global_norm(g)
    if not math.isfinite(norm):
        raise NonFiniteError(
            "the gradient on U is not finite", cause="the weights hold a NaN", fix="check the checkpoint"
        )
    clip = clip_factor(norm, max_norm)
    if state is None:
        state = OptimizerStep(checkpoint, execution, model.named_parameters(), g, clip, altered, earlier)
    step = state.on(g, clip, altered)
    narrow = step.narrow
    rounded_clip = rounded_clip_factor(
        ((gradient[name], narrow.get(name, torch.float32)) for name in accumulated), max_norm if narrow else 0.0
    )
    return TakenStep(step, g, rounded_clip, norm, clip)


def write_step(
    out: "Writer", found: TakenStep, checkpoint: "Artifact", policy: Policy, previous: "Artifact | None"
) -> dict[str, Any]:
    """Write a step of a chain: D, the sum of the steps since the checkpoint, and the moments that the next starts from.

    Args:
        out: receives the vector `direction` (D) and each moment after the step, by parameter name.
        found: the step.
        checkpoint: artifact of load-checkpoint.
        policy: θ + η·D before the step.
        previous: the step before, with a vector `direction`; None for the first one.

    Returns:
        The moments that are kept, norm of the gradient and its clip factor, and the norms of the step and of D.
    """
    parameters = policy.named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    kept = found.step.moments(sorted(moved_parameters(checkpoint)))
    before = None if previous is None else previous.vector("direction")
    after = {key: found.step.after(key, found.rounded_clip) for key in kept}
    of_step = of_direction = 0.0
    with ExitStack() as files:
        direction = files.enter_context(out.vector("direction", shapes, policy.dtype))
        moments = {
            key: files.enter_context(out.vector(key, {name: shapes[name] for name in names}, policy.dtype))
            for key, names in kept.items()
        }
        for block, v in found.blocks():
            of_step += squares(v)
            for key, file in moments.items():
                if block.name in kept[key]:
                    file.write(block, after[key][block])
            total = v if before is None else v + before.block(block).to(v.device).double()
            of_direction += squares(total)
            direction.write(block, total)
    return {
        "moments": sorted(kept),
        "gradient_norm": found.gradient_norm,
        "clip_factor": found.clip_factor,
        "step_norm": of_step**0.5,
        "update_norm": of_direction**0.5,
    }
