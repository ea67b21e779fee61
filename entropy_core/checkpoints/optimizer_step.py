"""The optimizer's next step, block by block, from the trainer's own file: what is elementwise is not stored."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_file import SavedMoments
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import optimizer_digest
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.vectors import Block, Lazy, in_blocks

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact


PARTS: dict[str, Callable[[NextStep], Tensor]] = {
    "direction": lambda step: step.direction,
    "momentum": lambda step: step.momentum,
    "gradient": lambda step: step.gradient,
    "decay": lambda step: step.decay,
    "preconditioner": lambda step: step.preconditioner,
    "jacobian": lambda step: step.jacobian,
}
"""What can be asked of a step, see `NextStep`."""


class OptimizerStep(Mapping[Block, NextStep]):
    """The AdamW step from a checkpoint's state, each block computed when it is asked for.

    Args:
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` lies.
        parameters: θ by name.
        gradient: before clipping.
        clip: factor that the gradient is scaled by.

    Raises:
        CheckpointError: `optimizer.pt` is not what was loaded any more.
    """

    def __init__(
        self,
        checkpoint: "Artifact",
        execution: "Execution",
        parameters: Mapping[str, Tensor],
        gradient: Mapping[Block, Tensor],
        clip: float,
    ) -> None:
        self._moments = _moments(checkpoint.summary["optimizer"], execution)
        self._gradient, self._parameters, self._clip = gradient, in_blocks(parameters), clip
        self._of: dict[str, tuple[int, int, AdamHyperparameters]] = {}  # parameter → steps, slot, its group's
        for group in checkpoint.json("groups.json"):
            hyperparameters = AdamHyperparameters(**group["hyperparameters"])
            for name, (steps, slot) in group["parameters"].items():
                self._of[name] = steps, slot, hyperparameters

    def __getitem__(self, block: Block) -> NextStep:
        gradient = self._gradient[block] if self._clip == 1.0 else self._clip * self._gradient[block]
        steps, slot, hyperparameters = self._of[block.name]
        if self._moments is None:
            state = AdamState(steps, torch.zeros_like(gradient), torch.zeros_like(gradient))
        else:
            state = self._moments.state(slot, steps, hyperparameters.amsgrad, block.start, block.stop)
        return NextStep(gradient, self._parameters[block], state, hyperparameters)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._gradient)

    def __len__(self) -> int:
        return len(self._gradient)

    def part(self, name: str) -> Lazy[Block]:
        """One part of the step as a vector; its name is one of `PARTS`."""
        return Lazy(list(self), lambda block: PARTS[name](self[block]))


def _moments(digest: str, execution: "Execution") -> SavedMoments | None:
    """Of `optimizer.pt`; None where the optimizer is fresh."""
    if not digest:
        return None
    path = execution.paths[digest]
    try:
        unchanged = optimizer_digest(path) == digest
    except OSError:
        unchanged = False
    if not unchanged:
        raise CheckpointError(
            f"{path} changed after the sweep had begun",
            cause="the trainer is still writing, or rotates its checkpoints",
            fix="run the sweep again when the checkpoint is complete",
        )
    return SavedMoments(path)
