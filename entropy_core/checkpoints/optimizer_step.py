"""The optimizer's next step, block by block, from the trainer's own file: what is elementwise is not stored."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_file import SavedMoments
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import optimizer_digest
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.next_step import NextStep, Rule
from entropy_core.numerics.rounded_step import Rounded, rounded_step
from entropy_core.numerics.rules import RULES
from entropy_core.numerics.vectors import Block, Lazy, in_blocks

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact


PARTS: dict[str, Callable[[NextStep], Tensor]] = {
    "direction": lambda step: step.direction,
    "taken": lambda step: step.taken,
    "momentum": lambda step: step.momentum,
    "gradient": lambda step: step.gradient,
    "decay": lambda step: step.decay,
}
"""What can be asked of a step, see `NextStep`."""

MAPS: dict[str, Callable[[NextStep, Tensor], Tensor]] = {
    "preconditioned": lambda step, covector: step.preconditioned(covector),
    "pulled_back": lambda step, covector: step.pulled_back(covector),
}
"""What a step can do to a covector."""


_Piece = Callable[[Mapping[Block, Tensor]], Tensor]  # the part of a vector that a step is of


class _Parameter(NamedTuple):
    """What load-checkpoint says of a parameter; the slot is None where there is none."""

    steps: int
    slot: int | None
    narrow: str
    fused: bool
    rule: Rule
    moments: tuple[str, ...]
    hyperparameters: Any


class OptimizerStep:
    """The next step from a checkpoint's state, each block computed when it is asked for, on the parameter's device.

    What is asked of the same block in a row takes its arithmetic only once. A rule that is not elementwise needs the
    whole parameter; its results are kept until another one is asked for.

    Args:
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` lies.
        parameters: θ by name.
        gradient: before clipping, on the device of the parameters.
        clip: factor that the gradient is scaled by.
        altered: hyperparameters in place of the saved ones.
        earlier: a step that was taken since the checkpoint; the state is then that after it, and θ has to be, too.

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
        earlier: "Artifact | None" = None,
    ) -> None:
        self._moments = None if earlier else _moments(checkpoint.summary["optimizer"], execution)
        self._after = StateAfter(earlier) if earlier else None
        self._gradient, self._parameters, self._clip = gradient, in_blocks(parameters), clip
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._blocks: dict[str, list[Block]] = {}
        for block in gradient:
            self._blocks.setdefault(block.name, []).append(block)
        self._devices = {name: parameter.device for name, parameter in parameters.items()}
        self._learning_rate = float(checkpoint.summary["learning_rate"])
        self._saved: dict[str, _Parameter] = {}
        for group in checkpoint.json("groups.json"):
            rule, moments = RULES[group["rule"]], tuple(group["moments"])
            hyperparameters = rule.hyperparameters(**group["hyperparameters"])
            for name, of_one in group["parameters"].items():
                steps, slot, narrow = of_one
                self._saved[name] = _Parameter(steps, slot, narrow, group["fused"], rule, moments, hyperparameters)
        self._of = _under(altered, self._saved)
        self._last_state: dict[Block, Any] = {}
        self._last_step: dict[Block, NextStep] = {}

    def on(self, gradient: Mapping[Block, Tensor], clip: float, altered: Altered | None = None) -> "OptimizerStep":
        """Return the step from the same state on another gradient; the arguments are those of the class.

        Without `altered`, the hyperparameters are the same, too. Steps from one state read a block of it only once
        where they are asked for it one after the other.
        """
        other = copy.copy(self)
        other._gradient, other._clip, other._last_step = gradient, clip, {}
        if altered is not None:
            other._of = _under(altered, self._saved)
        return other

    def _of_block(self, block: Block) -> NextStep:
        """The step of a block, by an elementwise rule."""
        if block not in self._last_step:
            of_one = self._of[block.name]
            gradient, state = self._clip_one(block), self._state(block)
            self._last_step.clear()
            self._last_step[block] = of_one.rule.next_step(
                gradient, self._parameters[block], state, of_one.hyperparameters
            )
        return self._last_step[block]

    def _of_parameter(self, name: str) -> NextStep:
        """The step of a whole parameter, by any rule."""
        of_one, blocks = self._of[name], self._blocks[name]
        g, theta = (
            torch.cat([find(block) for block in blocks]).view(self._shapes[name])
            for find in (self._clip_one, self._parameters.__getitem__)
        )
        found = {key: self._whole_moment(name, key) for key in of_one.moments}
        moments = {key: moment.to(self._devices[name]) for key, moment in found.items() if moment is not None}
        state = of_one.rule.state(self._steps(of_one), **moments)
        step: NextStep = of_one.rule.next_step(g, theta, state, of_one.hyperparameters)
        return step

    def _whole_moment(self, name: str, key: str) -> Tensor | None:
        if self._after is not None:
            return self._after.whole(name, key)
        slot = self._of[name].slot
        assert self._moments is not None and slot is not None
        return self._moments.whole(slot, key)

    def _steps(self, of_one: _Parameter) -> int:
        return of_one.steps + (self._after.steps if self._after else 0)

    def _clip_one(self, block: Block) -> Tensor:
        return self._gradient[block] if self._clip == 1.0 else self._clip * self._gradient[block]

    def _state(self, block: Block) -> Any:
        if block not in self._last_state:
            self._last_state.clear()
            self._last_state[block] = self._read_state(block)
        return self._last_state[block]

    def _read_state(self, block: Block) -> Any:
        of_one, after, device = self._of[block.name], self._after, self._devices[block.name]
        read: dict[str, Tensor | None]
        if after is not None and after.has(block.name):
            read = {key: after.read(block, key) for key in of_one.moments}
        elif self._moments is not None and of_one.slot is not None:
            saved, slot = self._moments, of_one.slot
            read = {key: saved.read(slot, key, block.start, block.stop) for key in of_one.moments}
        else:
            count = block.stop - block.start
            zeros = {key: torch.zeros(count, dtype=torch.float64, device=device) for key in of_one.moments}
            return of_one.rule.state(of_one.steps, **zeros)
        moments = {key: moment.to(device) for key, moment in read.items() if moment is not None}
        return of_one.rule.state(self._steps(of_one), **moments)

    @property
    def narrow(self) -> dict[str, torch.dtype]:
        """The dtype of each parameter that the trainer keeps in a dtype narrower than float32."""
        return {name: getattr(torch, of_one.narrow) for name, of_one in self._of.items() if of_one.narrow}

    @property
    def rounds(self) -> bool:
        """Whether the trainer's step differs from the direction: its weights, or its arithmetic, are narrow."""
        return bool(self.narrow) or any(of_one.rule is RULES["muon"] for of_one in self._of.values())

    def taken(self, rounded_clip: float) -> Lazy[Block]:
        """The step that the trainer takes, per unit of the nominal learning rate, with the rounding of its weights.

        Args:
            rounded_clip: factor that clips gradients of narrow dtypes.

        Returns:
            Float64; the plain step where the weights are not narrow.
        """
        plain = self.part("taken")
        return Lazy(
            list(self._gradient),
            lambda block: (
                self._rounded(block, rounded_clip).change / self._learning_rate
                if self._of[block.name].narrow
                else plain[block]
            ),
        )

    def moments(self, names: Collection[str]) -> dict[str, list[str]]:
        """Say which of some parameters have which moment: names by key of the moment."""
        found: dict[str, list[str]] = {}
        for name in names:
            for key in self._of[name].moments:
                found.setdefault(key, []).append(name)
        return found

    def after(self, key: str, rounded_clip: float) -> Lazy[Block]:
        """A moment after the step, as the next step starts from it.

        Args:
            key: of the moment.
            rounded_clip: factor that clips gradients of narrow dtypes.

        Returns:
            Float64, for the blocks of parameters that have it.
        """
        plain = self._vector(lambda step, _: step.after._asdict()[key])  # type: ignore[attr-defined]
        return Lazy(
            [block for block in self._gradient if key in self._of[block.name].moments],
            lambda block: (
                self._rounded(block, rounded_clip).after._asdict()[key] if self._of[block.name].narrow else plain[block]
            ),
        )

    def _rounded(self, block: Block, rounded_clip: float) -> Rounded:
        of_one = self._of[block.name]
        dtype = getattr(torch, of_one.narrow)
        gradient = self._gradient[block].to(dtype)
        gradient *= torch.tensor(rounded_clip)
        return rounded_step(
            gradient,
            self._parameters[block],
            self._state(block),
            of_one.hyperparameters,
            self._learning_rate,
            dtype,
            of_one.fused,
        )

    def stored(self, taken: Mapping[Block, Tensor]) -> Lazy[Block]:
        """The step as the weights have it in the number format of the trainer, per unit of the nominal learning rate.

        Args:
            taken: of `taken`, which is it already where the format is narrow.

        Returns:
            Float64. AdamW in float32 is computed by torch's own code; the step of another rule is added to the weights
            and rounded once. Weights that are no numbers of float32 are not rounded.
        """
        exact = self.part("taken")
        return Lazy(
            list(self._gradient),
            lambda block: (
                taken[block].to(self._devices[block.name]).double()
                if self._of[block.name].narrow
                else self._in_float32(block, exact)
            ),
        )

    def _in_float32(self, block: Block, exact: Mapping[Block, Tensor]) -> Tensor:
        of_one, theta, lr = self._of[block.name], self._parameters[block], self._learning_rate
        if not torch.equal(theta.float().double(), theta):
            return exact[block]
        if of_one.rule is not RULES["adamw"]:
            return ((theta + lr * exact[block]).float().double() - theta) / lr
        gradient = self._gradient[block].float() * torch.tensor(self._clip, dtype=torch.float32)
        state, hyperparameters = self._state(block), of_one.hyperparameters
        return rounded_step(gradient, theta, state, hyperparameters, lr, torch.float32, of_one.fused).change / lr

    def part(self, name: str) -> Lazy[Block]:
        """One part of the step as a vector; its name is one of `PARTS`."""
        return self._vector(lambda step, _: PARTS[name](step))

    def applied(self, name: str, covector: Mapping[Block, Tensor]) -> Lazy[Block]:
        """What the step does to a covector, as a vector; the name is one of `MAPS`."""
        return self._vector(lambda step, of: MAPS[name](step, of(covector)))

    def _vector(self, find: Callable[[NextStep, _Piece], Tensor]) -> Lazy[Block]:
        """A vector of what is found for each block, or for each parameter where its rule is not elementwise."""
        last: dict[str, Tensor] = {}

        def one(block: Block) -> Tensor:
            name = block.name
            if self._of[name].rule.elementwise:
                return find(self._of_block(block), lambda vector: vector[block].double())
            if name not in last:
                last.clear()
                last[name] = find(self._of_parameter(name), lambda vector: self._assembled(vector, name)).reshape(-1)
            return last[name][block.start : block.stop].clone()

        return Lazy(list(self._gradient), one)

    def _assembled(self, vector: Mapping[Block, Tensor], name: str) -> Tensor:
        return torch.cat([vector[block].double() for block in self._blocks[name]]).view(self._shapes[name])


def _under(altered: Altered, saved: Mapping[str, _Parameter]) -> dict[str, _Parameter]:
    """The same parameters with other hyperparameters."""
    return {name: one._replace(hyperparameters=altered.of(one.hyperparameters)) for name, one in saved.items()}


class StateAfter:
    """The optimizer's state after a step that is an artifact, with the moments among its vectors, by their keys.

    Args:
        artifact: has the `moments` that it keeps in its summary, and the number of `steps` since the checkpoint.
    """

    def __init__(self, artifact: "Artifact") -> None:
        self._files = {key: artifact.vector(key) for key in artifact.summary["moments"]}
        self._names = {name for file in self._files.values() for name in file}
        self.steps: int = artifact.summary["steps"]

    def has(self, name: str) -> bool:
        """Whether a parameter has any moment."""
        return name in self._names

    def read(self, block: Block, key: str) -> Tensor:
        """Read a piece of a moment, flat, float64."""
        return self._files[key].block(block).double()

    def whole(self, name: str, key: str) -> Tensor:
        """Read a moment in its shape, float64."""
        return self._files[key][name].double()


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
