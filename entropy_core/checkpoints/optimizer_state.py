"""The optimizer's state by parameter name.

    optimizer_by_name    name the contents of `optimizer.pt`, and check that a next step can be made from them
    check_moments        read the moments, and check that they are numbers
    fresh_optimizer      the state before the first step

The names come from the model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.layouts.single_file import KNOWN_STEPS
from entropy_core.checkpoints.optimizer_file import LATEST, SAVE_NAMES, range_of
from entropy_core.checkpoints.optimizer_rules import is_square, moment_shapes, moments_tell
from entropy_core.checkpoints.optimizer_settings import RULE, as_float, hyperparameters, learning_rate_of
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, ConfigError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.numerics.adamw import AdamHyperparameters
from entropy_core.numerics.rules import RULES

Shapes = dict[str, tuple[int, ...]]  # by parameter name
Slots = dict[str, dict[str, Any]]  # by parameter name


class OptimizerGroup(NamedTuple):
    """One parameter group.

    Attributes:
        hyperparameters: of its next step, as its rule has them.
        names: the group's parameters, in the optimizer's order.
        rule: name of what makes its step, in `numerics.rules`.
        moments: keys of the moments in its parameters' slots.
        fused: whether torch's fused implementation makes the step, which rounds less often in narrow dtypes.
        moments_tell: whether moments have the dtype of the weights that they belong to, as those of torch's Adam have.
    """

    hyperparameters: Any
    names: tuple[str, ...]
    rule: str = "adamw"
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    fused: bool = False
    moments_tell: bool = True


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """The optimizer's state by parameter name. The tensors have the dtype that they were saved in.

    Attributes:
        learning_rate: the trainer's nominal one, of the next step: the largest over the groups.
        groups: the groups that hold parameters; together they hold every parameter that moves once.
        unmoved: trainable parameters without a slot, which the trainer does not move.
        step: steps taken so far, per parameter; 0 where the optimizer does not count them.
        slot: the parameter's place among the slots of the file; empty where the optimizer is fresh.
        moments: key in the slots → by parameter, what the next step starts from: for AdamW `exp_avg` and `exp_avg_sq`,
            without bias correction.
    """

    learning_rate: float
    groups: tuple[OptimizerGroup, ...]
    unmoved: tuple[str, ...]
    step: dict[str, int]
    slot: dict[str, int]
    moments: dict[str, dict[str, Moment]]


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
        ConfigError: a learning rate is given to an optimizer that makes its own.
    """
    slot_of = _slots_by_name(saved, names, shapes)
    place = {id(slot): position for position, slot in enumerate(saved.slots.values())}
    unmoved = tuple(name for name in shapes if name not in slot_of)
    moving = [tuple(name for name in members if name in slot_of) for members in names]
    # the Trainer makes its second group even when nothing is in it
    named = [(group, members) for group, members in zip(saved.groups, moving, strict=True) if members]
    if learning_rate is not None and any(group.get("relative_step") for group, _ in named):
        fact = "learning_rate is set, and the run's Adafactor makes its own (relative_step=True)"
        raise ConfigError(fact, fix="leave `learning_rate` out")
    found = [learning_rate_of(saved.path, group, [slot_of[name] for name in members]) for group, members in named]
    saved_rate, nominal = max(found), max(found) if learning_rate is None else learning_rate
    rates = _relative_rates(saved, [group for group, _ in named], found, learning_rate)
    groups = []
    moments: dict[str, dict[str, Moment]] = {}
    for rate, (group, members) in zip(rates, named, strict=True):
        keys: dict[str, list[Moment]] = {}
        for name in members:
            for key in moment_shapes(group, shapes[name]):
                moments.setdefault(key, {})[name] = slot_of[name][key]
                keys.setdefault(key, []).append(slot_of[name][key])
        of_group = hyperparameters(saved.path, group, rate * nominal, rate, [m for of in keys.values() for m in of])
        tell = bool(keys) and moments_tell(group)
        groups.append(OptimizerGroup(of_group, members, group[RULE], tuple(keys), bool(group.get("fused")), tell))
    state = OptimizerState(
        learning_rate=nominal,
        groups=tuple(groups),
        unmoved=unmoved,
        step=_steps(saved.path, slot_of, {n for group in groups if RULES[group.rule].counts for n in group.names}),
        slot={name: place[id(slot)] for name, slot in slot_of.items()},
        moments=moments,
    )
    return state, _assumptions(state, [group for group, _ in named], shapes, saved_rate, learning_rate)


def _assumptions(
    state: OptimizerState,
    saved_groups: list[dict[str, Any]],
    shapes: Shapes,
    saved_rate: float,
    learning_rate: float | None,
) -> tuple[str, ...]:
    """What was assumed of the optimizer, as sentences; `saved_groups` are the file's, in the order of the state's."""
    unmoved, groups = state.unmoved, state.groups
    said: tuple[str, ...] = ()
    if unmoved:
        said += (
            f"The trainer does not move {len(unmoved)} of {len(shapes)} parameters, which have no slot in "
            f"optimizer.pt: {some_names(unmoved)}.",
        )
    if learning_rate is not None:
        said += (f"Learning rate {learning_rate:g} in place of the saved {saved_rate:g}.",)
    decays = [group for group, of in zip(saved_groups, groups, strict=True) if of.hyperparameters.weight_decay]
    if any(group[RULE] == "adamw" and "decoupled_weight_decay" not in group for group in decays):
        said += ("optimizer.pt does not tell AdamW from Adam: taken to be AdamW, with decoupled weight decay.",)
    if any(group.rule == "muon" for group in groups):
        said += (
            "Muon orthogonalises in bfloat16, and so does the step here; intervals over U are of the step without that "
            "rounding. The part of δH₁ that rounding adds is listed.",
        )
    if (rules := sorted({RULES[group.rule].name for group in groups})) != ["AdamW"]:
        said += (f"The optimizer is {' and '.join(rules)}, by the keys of its state.",)
    return said


def check_moments(path: Path, state: OptimizerState) -> None:
    """Read all moments, one at a time, and verify that they are numbers.

    Args:
        path: of `optimizer.pt`.
        state: what it holds, by parameter name.

    Raises:
        CheckpointError: a moment is NaN or infinite, or a second one is negative; names it.
    """
    bad = [
        f"{name} ({key})"
        for name in state.step
        for key, by_name in state.moments.items()
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
    return (low >= 0 or not is_square(key)) and -math.inf < low <= high < math.inf


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
        groups=(OptimizerGroup(usual, tuple(shapes)),),
        unmoved=(),
        step=dict.fromkeys(shapes, 0),
        slot={},
        moments={
            key: {name: torch.zeros(shape) for name, shape in shapes.items()} for key in ("exp_avg", "exp_avg_sq")
        },
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
    if extra := [str(index) for index, slot in slots.items() if index not in listed and slot]:
        fact = f"{path} has slots that belong to no parameter group: {some_names(extra)}"
        raise CheckpointError(fact, cause="the optimizer of another model", fix=SAVE_AGAIN)
    slot_of = {name: slots[index_of[name]] for name in shapes if index_of.get(name) in slots}
    if not slot_of:
        raise CheckpointError(
            f"{path} has a slot of none of the {len(shapes)} trained parameters",
            cause="the optimizer of another model",
            fix=SAVE_AGAIN,
        )
    group_of = {name: group for group, members in zip(groups, names, strict=True) for name in members}
    _require_moments(path, slot_of, shapes, group_of)
    return slot_of


def _require_moments(path: Path, slot_of: Slots, shapes: Shapes, group_of: dict[str, dict[str, Any]]) -> None:
    moments: list[tuple[str, str, Any, tuple[int, ...]]] = [
        (name, key, slot.get(key), shape)
        for name, slot in slot_of.items()
        for key, shape in moment_shapes(group_of[name], shapes[name]).items()
    ]
    if bad := [f"{n} ({key})" for n, key, m, _ in moments if not isinstance(m, Moment) or not m.is_floating_point()]:
        raise CheckpointError(f"{path}: slots lack a moment: {some_names(bad)}", fix=KNOWN_STEPS)
    if bad := [f"{n} ({key} {tuple(m.shape)}, model {shapes[n]})" for n, key, m, of in moments if m.shape != of]:
        raise CheckpointError(
            f"{path}: slots have another shape than their parameter: {some_names(bad)}",
            cause="param groups in another order than the Trainer's, or the optimizer of another model",
            fix=SAVE_NAMES,
        )


def _steps(path: Path, slot_of: Slots, counted: set[str]) -> dict[str, int]:
    steps = {name: as_float(slot.get("step")) for name, slot in slot_of.items() if name in counted}
    if unset := [name for name, step in steps.items() if not 1 <= step < LATEST]:
        raise CheckpointError(
            f"{path} has no step count, or an impossible one, for {some_names(unset)}",
            cause="saved before the first step, or an optimizer other than torch's AdamW",
            fix="probe a later checkpoint of a run with torch's AdamW",
        )
    return {name: int(steps.get(name, 0)) for name in slot_of}


def _relative_rates(
    saved: SavedOptimizer, groups: list[dict[str, Any]], rates: list[float], learning_rate: float | None
) -> list[float]:
    """Learning rates of the groups over the largest; `initial_lr` gives them where a schedule has ended in 0."""
    if max(rates) == 0:
        initial = [as_float(group.get("initial_lr")) for group in groups]
        if learning_rate is None:
            peak = f" (the run's peak was {max(initial):g})" if all(rate > 0 for rate in initial) else ""
            raise CheckpointError(
                f"{saved.path} has learning rate 0 in every param group",
                cause="the end of the learning-rate schedule",
                fix=f"set `learning_rate` in the config{peak}",
            )
        rates = initial if all(0 <= r < math.inf for r in initial) and max(initial) > 0 else [1.0] * len(initial)
    return [rate / max(rates) for rate in rates]
