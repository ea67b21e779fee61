"""Adam's state by parameter name.

    load_optimizer       what `optimizer.pt` holds, by index; no code in it is run
    optimizer_by_name    the same by name, sound and ready for a next step

The names themselves are the model's to say.
"""

import math
import pickle
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoint_files import SAVE_AGAIN
from entropy_core.errors import CheckpointError, some_names

OTHER_OPTIMIZERS = {
    "momentum_buffer": "SGD with momentum, or Muon",
    "square_avg": "RMSprop or Adadelta",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "exp_avg_sq_row": "Adafactor",
    "state1": "a bitsandbytes optimizer",
    "sum": "Adagrad",
}
SAVE_NAMES = "build the optimizer from named parameters and save again"
_USE_ADAMW = "probe a checkpoint that was trained with torch's AdamW (optim='adamw_torch' or 'adamw_torch_fused')"
Shapes = dict[str, tuple[int, ...]]  # by parameter name
Slots = dict[str, dict[str, Any]]  # by parameter name


@dataclass(frozen=True)
class AdamGroup:
    """One parameter group of Adam or AdamW.

    Attributes:
        lr: learning rate of the next step.
        beta1, beta2: decay rates of the two moments, per step.
        eps: added to the square root of the second moment.
        weight_decay: λ, per unit of learning rate.
        amsgrad: the denominator uses the largest second moment so far.
        maximize: the step goes up the gradient.
        names: the group's parameters, in the optimizer's order.
        decoupled: True for AdamW (decay of the parameter), False for Adam (λθ is added to the gradient).
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    names: tuple[str, ...]
    decoupled: bool


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Adam's state by parameter name. The tensors have the parameter's shape and the dtype they were saved in.

    Attributes:
        groups: the groups that hold parameters; together they hold every trainable parameter once.
        step: steps taken so far, per parameter.
        exp_avg, exp_avg_sq: first and second moment of the gradient, without bias correction.
        max_exp_avg_sq: largest second moment so far, for the amsgrad groups only.
    """

    groups: tuple[AdamGroup, ...]
    step: dict[str, int]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    max_exp_avg_sq: dict[str, Tensor]

    @property
    def learning_rate(self) -> float:
        """The trainer's nominal learning rate: the largest over the groups."""
        return max(group.lr for group in self.groups)


class SavedOptimizer(NamedTuple):
    """What `optimizer.pt` holds, by the optimizer's own numbering."""

    path: Path
    slots: dict[Any, dict[str, Any]]  # index of a parameter → its state
    groups: list[dict[str, Any]]  # hyperparameters, and the indices of the group's parameters as `params`


def load_optimizer(path: Path) -> SavedOptimizer:
    """Load the optimizer's state without running code from the file.

    Args:
        path: of `optimizer.pt`.

    Returns:
        Slots and groups; the tensors are on the CPU and map the file privately.

    Raises:
        CheckpointError: the file is damaged, or a pickle with code; the optimizer is not Adam or AdamW, has not made a
            step, or lacks hyperparameters.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a complete archive of torch.save, and was not read",
            cause="the save or the copy was interrupted, or it is a bare pickle",
            way_out=SAVE_AGAIN,
        )
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own message is not repeated: it recommends to switch the safety off
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and numbers ({code[1]}), and was not executed",
                cause="an optimizer that saves its own classes, or code from an untrusted source",
                way_out=_USE_ADAMW,
            ) from error
        fact = f"{path} cannot be read as tensors and numbers ({type(error).__name__})"
        raise CheckpointError(fact, cause="a damaged file", way_out=SAVE_AGAIN) from error
    saved = saved if isinstance(saved, dict) else {}
    slots, groups = saved.get("state"), saved.get("param_groups")
    is_state = isinstance(slots, dict) and all(isinstance(slot, dict) for slot in slots.values())
    is_list = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not (is_state and is_list and groups and all(isinstance(group.get("params"), list) for group in groups)):
        fact = f"{path} is not the state_dict of a torch optimizer (`state` and `param_groups`)"
        raise CheckpointError(fact, way_out=_USE_ADAMW)
    _require_adam(path, slots, groups)
    return SavedOptimizer(path, slots, groups)


def _require_adam(path: Path, slots: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    kinds = {key for slot in slots.values() for key in slot}
    foreign = sorted(kinds - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
    plain_sgd = not kinds and "momentum" in groups[0]
    if plain_sgd or foreign or (kinds and not {"exp_avg", "exp_avg_sq"} <= kinds):
        known = (OTHER_OPTIMIZERS[key] for key in foreign if key in OTHER_OPTIMIZERS)
        raise CheckpointError(
            f"{path} is not the state of Adam or AdamW: its slots are {some_names(sorted(kinds)) or 'empty'}",
            cause=f"the run used {'SGD' if plain_sgd else next(known, 'another optimizer')}",
            way_out=_USE_ADAMW,
        )
    if not kinds:
        fact = f"{path} has no slots"
        raise CheckpointError(fact, cause="saved before the first step", way_out="probe a later checkpoint")
    for number, group in enumerate(groups):
        if lacking := [key for key in ("lr", "betas", "eps", "weight_decay") if group.get(key) is None]:
            fact = f"{path} has no {', '.join(lacking)} in param group {number}"
            raise CheckpointError(fact, cause="an optimizer other than torch's AdamW", way_out=_USE_ADAMW)
        if "amsgrad" not in group:  # RAdam and fused third-party variants have Adam's slots and another rule
            raise CheckpointError(
                f"{path} has no amsgrad in param group {number}, so that it is not torch's Adam or AdamW",
                cause="RAdam or a third-party optimizer with the same slots",
                way_out=_USE_ADAMW,
            )


def optimizer_by_name(
    saved: SavedOptimizer, names: list[tuple[str, ...]], shapes: Shapes, learning_rate: float | None
) -> tuple[OptimizerState, tuple[str, ...]]:
    """Give the slots their names, and verify that they belong to the model and can make a next step.

    Args:
        saved: what the file holds.
        names: of the parameters, for every group in its order.
        shapes: every parameter of the model; the state must cover them all, and nothing else.
        learning_rate: takes the place of the largest saved one; groups keep their ratios. None keeps the saved ones.

    Returns:
        The state; and what was assumed, one sentence each.

    Raises:
        CheckpointError: a slot is missing, left over, of a wrong shape, not finite, or before its first step; a
            hyperparameter is out of range; every saved learning rate is 0 and none is given.
    """
    slot_of = _slots_by_name(saved, names, shapes)
    named = zip(saved.groups, names, strict=True)  # the Trainer makes its second group even when nothing is in it
    groups = tuple(_adam_group(saved.path, group, members) for group, members in named if members)
    state = OptimizerState(
        groups=groups,
        step=_steps(saved.path, slot_of),
        exp_avg={name: slot["exp_avg"] for name, slot in slot_of.items()},
        exp_avg_sq={name: slot["exp_avg_sq"] for name, slot in slot_of.items()},
        max_exp_avg_sq={n: slot_of[n]["max_exp_avg_sq"] for group in groups if group.amsgrad for n in group.names},
    )
    said: tuple[str, ...] = ()
    if learning_rate is not None:
        said += (f"Learning rate {learning_rate:g} in place of the saved {state.learning_rate:g}.",)
    if learning_rate is not None or state.learning_rate == 0:
        state = _with_learning_rate(saved, state, learning_rate)
    if any(group.weight_decay for group in groups) and any("decoupled_weight_decay" not in g for g in saved.groups):
        said += ("optimizer.pt does not tell AdamW from Adam: taken to be AdamW, with decoupled weight decay.",)
    return state, said


def _slots_by_name(saved: SavedOptimizer, names: list[tuple[str, ...]], shapes: Shapes) -> Slots:
    """One sound slot for every parameter, in the model's order; otherwise an error that names them."""
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
        raise CheckpointError(fact, cause="optimizer.pt and config.json of two different models", way_out=SAVE_AGAIN)
    if missing := [name for name in shapes if not slots.get(index_of.get(name))]:
        raise CheckpointError(
            f"{path} covers {len(shapes) - len(missing)} of {len(shapes)} parameters; missing: {some_names(missing)}",
            cause="frozen parameters, or parameters that never received a gradient",
            way_out="probe a run that trains all parameters",
        )
    listed = set(index_of.values())
    if extra := [str(index) for index in slots if index not in listed]:
        fact = f"{path} has slots that belong to no parameter group: {some_names(extra)}"
        raise CheckpointError(fact, cause="the optimizer of another model", way_out=SAVE_AGAIN)
    slot_of = {name: slots[index_of[name]] for name in shapes}
    amsgrad = {name for group, members in zip(groups, names, strict=True) if group["amsgrad"] for name in members}
    _require_sound_moments(path, slot_of, shapes, amsgrad)
    return slot_of


def _require_sound_moments(path: Path, slot_of: Slots, shapes: Shapes, amsgrad: set[str]) -> None:
    moments: list[tuple[str, str, Any]] = [
        (name, key, slot.get(key))
        for name, slot in slot_of.items()
        for key in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * (name in amsgrad)
    ]
    if bad := [f"{n} ({key})" for n, key, m in moments if not isinstance(m, Tensor) or not m.is_floating_point()]:
        raise CheckpointError(f"{path}: slots lack a moment: {some_names(bad)}", way_out=_USE_ADAMW)
    if bad := [f"{n} ({key} {tuple(m.shape)}, model {shapes[n]})" for n, key, m in moments if m.shape != shapes[n]]:
        raise CheckpointError(
            f"{path}: slots have another shape than their parameter: {some_names(bad)}",
            cause="param groups in another order than the Trainer's, or the optimizer of another model",
            way_out=SAVE_NAMES,
        )
    if bad := [f"{n} ({key})" for n, key, m in moments if m.numel() and not _is_sound(m, key)]:
        raise CheckpointError(
            f"{path}: moments are NaN, infinite, or a negative square: {some_names(bad)}",
            cause="the run diverged before this checkpoint",
            way_out="probe an earlier checkpoint",
        )


def _is_sound(moment: Tensor, key: str) -> bool:
    low, high = (float(x) for x in torch.aminmax(moment))  # NaN if any element is
    return (low >= 0 or key == "exp_avg") and -math.inf < low <= high < math.inf


def _steps(path: Path, slot_of: Slots) -> dict[str, int]:
    steps = {name: as_float(slot.get("step")) for name, slot in slot_of.items()}
    if unset := [name for name, step in steps.items() if not 1 <= step < math.inf]:
        raise CheckpointError(
            f"{path} has no step count, or one of 0, for {some_names(unset)}",
            cause="saved before the first step, or an optimizer other than torch's AdamW",
            way_out="probe a later checkpoint of a run with torch's AdamW",
        )
    return {name: int(step) for name, step in steps.items()}


def _adam_group(path: Path, group: dict[str, Any], names: tuple[str, ...]) -> AdamGroup:
    betas = group["betas"] if isinstance(group["betas"], list | tuple) and len(group["betas"]) == 2 else (None, None)
    lr, beta1, beta2, eps, decay = (as_float(x) for x in (group["lr"], *betas, group["eps"], group["weight_decay"]))
    if not (0 <= lr < math.inf and 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < math.inf and abs(decay) < math.inf):
        saved = ", ".join(f"{key} {group[key]}" for key in ("lr", "betas", "eps", "weight_decay"))
        raise CheckpointError(f"{path} has hyperparameters out of range: {saved}", way_out=SAVE_AGAIN)
    amsgrad, maximize = bool(group["amsgrad"]), bool(group.get("maximize", False))
    decoupled = bool(group.get("decoupled_weight_decay", True))
    return AdamGroup(lr, beta1, beta2, eps, decay, amsgrad, maximize, names, decoupled)


def _with_learning_rate(saved: SavedOptimizer, state: OptimizerState, learning_rate: float | None) -> OptimizerState:
    """The groups with the asked-for learning rate; `initial_lr` gives the ratios where a schedule has ended in 0."""
    initial = [as_float(group.get("initial_lr")) for group in saved.groups if group["params"]]
    if learning_rate is None:
        peak = f" (the run's peak was {max(initial):g})" if all(rate > 0 for rate in initial) else ""
        raise CheckpointError(
            f"{saved.path} has learning rate 0 in every param group",
            cause="the end of the learning-rate schedule",
            way_out=f"set `learning_rate` in the config{peak}",
        )
    rates = [group.lr for group in state.groups]
    if max(rates) == 0:
        rates = initial if all(0 <= r < math.inf for r in initial) and max(initial) > 0 else [1.0] * len(initial)
    pairs = zip(state.groups, rates, strict=True)
    return replace(state, groups=tuple(replace(g, lr=learning_rate * (rate / max(rates))) for g, rate in pairs))


def as_float(value: Any) -> float:
    """A number or a one-element tensor as a float; NaN for anything else."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if is_number else math.nan
