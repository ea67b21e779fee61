"""Adam's state by parameter name.

    optimizer_by_name    what `optimizer.pt` holds, under its parameters' names: whole, and ready for a next step
    check_moments        that its moments are numbers, for which they have to be read
    fresh_optimizer      before the first step

The names themselves are the model's to say.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.layouts.single_file import USE_ADAMW
from entropy_core.checkpoints.optimizer_file import LATEST, SAVE_NAMES, as_float, range_of
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.numerics.adamw import AdamHyperparameters

Shapes = dict[str, tuple[int, ...]]  # by parameter name
Slots = dict[str, dict[str, Any]]  # by parameter name


class AdamGroup(NamedTuple):
    """One parameter group of Adam or AdamW.

    Attributes:
        hyperparameters: of its next step.
        names: the group's parameters, in the optimizer's order.
        fused: whether torch's fused implementation makes the step, which rounds less often in narrow dtypes.
    """

    hyperparameters: AdamHyperparameters
    names: tuple[str, ...]
    fused: bool = False


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Adam's state by parameter name. The tensors have the parameter's shape and the dtype they were saved in.

    Attributes:
        learning_rate: the trainer's nominal one, of the next step: the largest over the groups.
        groups: the groups that hold parameters; together they hold every parameter that moves once.
        unmoved: trainable parameters without a slot, which the trainer does not move.
        step: steps taken so far, per parameter.
        slot: the parameter's place among the slots of the file; empty where the optimizer is fresh.
        exp_avg, exp_avg_sq: first and second moment of the gradient, without bias correction.
        max_exp_avg_sq: largest second moment so far, for the amsgrad groups only.
    """

    learning_rate: float
    groups: tuple[AdamGroup, ...]
    unmoved: tuple[str, ...]
    step: dict[str, int]
    slot: dict[str, int]
    exp_avg: dict[str, Moment]
    exp_avg_sq: dict[str, Moment]
    max_exp_avg_sq: dict[str, Moment]


def optimizer_by_name(
    saved: SavedOptimizer, names: list[tuple[str, ...]], shapes: Shapes, learning_rate: float | None
) -> tuple[OptimizerState, tuple[str, ...]]:
    """Give the slots their names, and verify that they belong to the model and can make a next step.

    Nothing of the size of the model is read: `check_moments` does that.

    Args:
        saved: what the file holds.
        names: of the parameters, for every group in its order.
        shapes: every trained parameter; one without a slot is not moved.
        learning_rate: takes the place of the largest saved one; groups keep their ratios. None keeps the saved ones.

    Returns:
        The state; and what was assumed, one sentence each.

    Raises:
        CheckpointError: there is no slot, or one is left over, of a wrong shape, or before its first step; a
            hyperparameter is out of range; every saved learning rate is 0 and none is given.
    """
    slot_of = _slots_by_name(saved, names, shapes)
    place = {id(slot): position for position, slot in enumerate(saved.slots.values())}
    unmoved = tuple(name for name in shapes if name not in slot_of)
    moving = [tuple(name for name in members if name in slot_of) for members in names]
    # the Trainer makes its second group even when nothing is in it
    named = [(group, members) for group, members in zip(saved.groups, moving, strict=True) if members]
    found = [_hyperparameters(saved.path, group) for group, _ in named]
    saved_rate = max(lr for lr, _ in found)
    rates = _relative_rates(saved, [lr for lr, _ in found], learning_rate)
    groups = tuple(
        AdamGroup(of_group._replace(relative_lr=rate), members, bool(group.get("fused")))
        for (_, of_group), rate, (group, members) in zip(found, rates, named, strict=True)
    )
    state = OptimizerState(
        learning_rate=saved_rate if learning_rate is None else learning_rate,
        groups=groups,
        unmoved=unmoved,
        step=_steps(saved.path, slot_of),
        slot={name: place[id(slot)] for name, slot in slot_of.items()},
        exp_avg={name: slot["exp_avg"] for name, slot in slot_of.items()},
        exp_avg_sq={name: slot["exp_avg_sq"] for name, slot in slot_of.items()},
        max_exp_avg_sq={
            n: slot_of[n]["max_exp_avg_sq"] for group in groups if group.hyperparameters.amsgrad for n in group.names
        },
    )
    said: tuple[str, ...] = ()
    if unmoved:
        said += (
            f"The trainer does not move {len(unmoved)} of {len(shapes)} parameters, which have no slot in "
            f"optimizer.pt: {some_names(unmoved)}.",
        )
    if learning_rate is not None:
        said += (f"Learning rate {learning_rate:g} in place of the saved {saved_rate:g}.",)
    decays = any(group.hyperparameters.weight_decay for group in groups)
    if decays and any("decoupled_weight_decay" not in group for group in saved.groups):
        said += ("optimizer.pt does not tell AdamW from Adam: taken to be AdamW, with decoupled weight decay.",)
    return state, said


def check_moments(path: Path, state: OptimizerState) -> None:
    """Read all moments, one at a time, and verify that they are numbers.

    Args:
        path: of `optimizer.pt`.
        state: what it holds, by parameter name.

    Raises:
        CheckpointError: a moment is NaN or infinite, or a second one is negative; names it.
    """
    slots = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "max_exp_avg_sq": state.max_exp_avg_sq}
    bad = [
        f"{name} ({key})"
        for name in state.step
        for key, by_name in slots.items()
        if name in by_name and not _is_sound(by_name[name], key)
    ]
    if bad:
        raise CheckpointError(
            f"{path}: moments are NaN, infinite, or a negative square: {some_names(bad)}",
            cause="the run diverged before this checkpoint",
            fix="probe an earlier checkpoint",
        )


def _is_sound(moment: Moment, key: str) -> bool:
    if not moment.numel():
        return True
    low, high = range_of(moment)
    return (low >= 0 or key == "exp_avg") and -math.inf < low <= high < math.inf


def fresh_optimizer(shapes: Shapes, learning_rate: float) -> tuple[OptimizerState, tuple[str, ...]]:
    """AdamW before its first step, with the hyperparameters that the Trainer has by default.

    Args:
        shapes: every trained parameter.
        learning_rate: of the step.

    Returns:
        The state, whose moments are float32 zeros; and what was assumed.
    """
    usual = AdamHyperparameters(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    state = OptimizerState(
        learning_rate=learning_rate,
        groups=(AdamGroup(usual, tuple(shapes)),),
        unmoved=(),
        step=dict.fromkeys(shapes, 0),
        slot={},
        exp_avg={name: torch.zeros(shape) for name, shape in shapes.items()},
        exp_avg_sq={name: torch.zeros(shape) for name, shape in shapes.items()},
        max_exp_avg_sq={},
    )
    said = f"betas ({usual.beta1:g}, {usual.beta2:g}), eps {usual.eps:g}, weight decay {usual.weight_decay:g}"
    return state, (f"The optimizer is taken to be AdamW before its first step, with {said}.",)


def _slots_by_name(saved: SavedOptimizer, names: list[tuple[str, ...]], shapes: Shapes) -> Slots:
    """The slots, each sound, of the parameters that have one, in the model's order."""
    path, slots, groups = saved
    index_of: dict[str, Any] = {}
    unknown: list[str] = []
    for group, members in zip(groups, names, strict=True):
        for index, name in zip(group["params"], members, strict=True):
            if name not in shapes or name in index_of:
                unknown.append(name)
            index_of[name] = index
    if unknown:
        fact = f"{path} names parameters that the model does not have, or names them twice: {some_names(unknown)}"
        raise CheckpointError(fact, cause="optimizer.pt and config.json of two different models", fix=SAVE_AGAIN)
    listed = set(index_of.values())
    if extra := [str(index) for index in slots if index not in listed]:
        fact = f"{path} has slots that belong to no parameter group: {some_names(extra)}"
        raise CheckpointError(fact, cause="the optimizer of another model", fix=SAVE_AGAIN)
    slot_of = {name: slots[index_of[name]] for name in shapes if slots.get(index_of.get(name))}
    if not slot_of:
        raise CheckpointError(
            f"{path} has a slot of none of the {len(shapes)} trained parameters",
            cause="the optimizer of another model",
            fix=SAVE_AGAIN,
        )
    amsgrad = {name for group, members in zip(groups, names, strict=True) if group["amsgrad"] for name in members}
    _require_moments(path, slot_of, shapes, amsgrad)
    return slot_of


def _require_moments(path: Path, slot_of: Slots, shapes: Shapes, amsgrad: set[str]) -> None:
    moments: list[tuple[str, str, Any]] = [
        (name, key, slot.get(key))
        for name, slot in slot_of.items()
        for key in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * (name in amsgrad)
    ]
    if bad := [f"{n} ({key})" for n, key, m in moments if not isinstance(m, Moment) or not m.is_floating_point()]:
        raise CheckpointError(f"{path}: slots lack a moment: {some_names(bad)}", fix=USE_ADAMW)
    if bad := [f"{n} ({key} {tuple(m.shape)}, model {shapes[n]})" for n, key, m in moments if m.shape != shapes[n]]:
        raise CheckpointError(
            f"{path}: slots have another shape than their parameter: {some_names(bad)}",
            cause="param groups in another order than the Trainer's, or the optimizer of another model",
            fix=SAVE_NAMES,
        )


def _steps(path: Path, slot_of: Slots) -> dict[str, int]:
    steps = {name: as_float(slot.get("step")) for name, slot in slot_of.items()}
    if unset := [name for name, step in steps.items() if not 1 <= step < LATEST]:
        raise CheckpointError(
            f"{path} has no step count, or one that cannot be, for {some_names(unset)}",
            cause="saved before the first step, or an optimizer other than torch's AdamW",
            fix="probe a later checkpoint of a run with torch's AdamW",
        )
    return {name: int(step) for name, step in steps.items()}


def _hyperparameters(path: Path, group: dict[str, Any]) -> tuple[float, AdamHyperparameters]:
    """The learning rate of a group, and its other hyperparameters."""
    betas = group["betas"] if isinstance(group["betas"], list | tuple) and len(group["betas"]) == 2 else (None, None)
    lr, beta1, beta2, eps, decay = (as_float(x) for x in (group["lr"], *betas, group["eps"], group["weight_decay"]))
    if not (0 <= lr < math.inf and 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < math.inf and abs(decay) < math.inf):
        saved = ", ".join(f"{key} {group[key]}" for key in ("lr", "betas", "eps", "weight_decay"))
        raise CheckpointError(f"{path} has hyperparameters out of range: {saved}", fix=SAVE_AGAIN)
    return lr, AdamHyperparameters(
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=decay,
        maximize=bool(group.get("maximize", False)),
        decoupled=bool(group.get("decoupled_weight_decay", True)),
        amsgrad=bool(group["amsgrad"]),
    )


def _relative_rates(saved: SavedOptimizer, rates: list[float], learning_rate: float | None) -> list[float]:
    """Learning rates of the groups over the largest; `initial_lr` gives them where a schedule has ended in 0."""
    if max(rates) == 0:
        initial = [as_float(group.get("initial_lr")) for group in saved.groups if group["params"]]
        if learning_rate is None:
            peak = f" (the run's peak was {max(initial):g})" if all(rate > 0 for rate in initial) else ""
            raise CheckpointError(
                f"{saved.path} has learning rate 0 in every param group",
                cause="the end of the learning-rate schedule",
                fix=f"set `learning_rate` in the config{peak}",
            )
        rates = initial if all(0 <= r < math.inf for r in initial) and max(initial) > 0 else [1.0] * len(initial)
    return [rate / max(rates) for rate in rates]
