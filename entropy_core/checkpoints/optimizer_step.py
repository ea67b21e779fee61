"""The optimizer's next step, block by block, from the trainer's own file: what is elementwise is not stored."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_file import SavedMoments
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import optimizer_digest
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.rounded_step import rounded_step
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


class _Parameter(NamedTuple):
    """What load-checkpoint says of a parameter; the slot is None where there is none."""

    steps: int
    slot: int | None
    narrow: str
    fused: bool
    hyperparameters: AdamHyperparameters


class OptimizerStep(Mapping[Block, NextStep]):
    """The AdamW step from a checkpoint's state, each block computed when it is asked for, on the policy's device.

    Args:
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` lies.
        parameters: θ by name.
        gradient: before clipping, on the device of the parameters.
        clip: factor that the gradient is scaled by.
        altered: hyperparameters in place of the saved ones.

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
        altered: Altered = Altered(),  # noqa: B008 (immutable)
    ) -> None:
        self._moments = _moments(checkpoint.summary["optimizer"], execution)
        self._gradient, self._parameters, self._clip = gradient, in_blocks(parameters), clip
        self._device = next(iter(parameters.values())).device
        self._learning_rate = float(checkpoint.summary["learning_rate"])
        self._of: dict[str, _Parameter] = {}
        for group in checkpoint.json("groups.json"):
            hyperparameters = altered.of(AdamHyperparameters(**group["hyperparameters"]))
            for name, of_one in group["parameters"].items():
                steps, slot, narrow = of_one
                self._of[name] = _Parameter(steps, slot, narrow, group["fused"], hyperparameters)

    def __getitem__(self, block: Block) -> NextStep:
        gradient = self._gradient[block] if self._clip == 1.0 else self._clip * self._gradient[block]
        return NextStep(gradient, self._parameters[block], self._state(block), self._of[block.name].hyperparameters)

    def _state(self, block: Block) -> AdamState:
        of_one = self._of[block.name]
        if self._moments is None or of_one.slot is None:
            count = block.stop - block.start
            zeros = (torch.zeros(count, dtype=torch.float64, device=self._device) for _ in range(2))
            return AdamState(of_one.steps, *zeros)
        amsgrad = of_one.hyperparameters.amsgrad
        return self._moments.state(of_one.slot, of_one.steps, amsgrad, block.start, block.stop).to(self._device)

    @property
    def narrow(self) -> dict[str, torch.dtype]:
        """The dtype of each parameter that the trainer keeps in a dtype narrower than float32."""
        return {name: getattr(torch, of_one.narrow) for name, of_one in self._of.items() if of_one.narrow}

    def taken(self, block: Block, rounded_clip: float) -> Tensor:
        """The step that the trainer takes, per unit of the nominal learning rate, with the rounding of its weights.

        Args:
            block: a piece of a parameter.
            rounded_clip: factor that clips gradients of narrow dtypes.

        Returns:
            Float64; the plain direction where the weights are not narrow.
        """
        of_one = self._of[block.name]
        if not of_one.narrow:
            return self[block].direction
        dtype = getattr(torch, of_one.narrow)
        gradient = self._gradient[block].to(dtype)
        gradient *= torch.tensor(rounded_clip)
        change = rounded_step(
            gradient,
            self._parameters[block],
            self._state(block),
            of_one.hyperparameters,
            self._learning_rate,
            dtype,
            of_one.fused,
        )
        return change / self._learning_rate

    def __iter__(self) -> Iterator[Block]:
        return iter(self._gradient)

    def __len__(self) -> int:
        return len(self._gradient)

    def part(self, name: str) -> Lazy[Block]:
        """One part of the step as a vector; its name is one of `PARTS`."""
        return Lazy(list(self), lambda block: PARTS[name](self[block]))


def moved_parameters(checkpoint: "Artifact") -> set[str]:
    """Return the names of the parameters that the trainer moves; load-checkpoint found no group of the others."""
    placed = checkpoint.table("parameters.parquet").select(["name", "group"]).to_pylist()
    return {row["name"] for row in placed if row["group"] is not None}


def with_zeros(gradient: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add zeros to a gradient, in no memory, for the parameters that it lacks.

    What the trainer does not move has no gradient there, neither in the step nor in the norm that is clipped.
    """
    return {
        name: gradient[name]
        if name in gradient
        else torch.zeros((), dtype=torch.float64, device=p.device).expand(p.shape)
        for name, p in parameters.items()
    }


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
