"""Which optimizer a state is of, from its own keys, and what one group of it says of the next step.

    recognised        the name of the rule of every group, and slots that hold nothing but its moments
    moment_shapes     the moments that the next step of a parameter needs
    hyperparameters   of a group

An optimizer that none of this fits is refused by its own name.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.layouts.single_file import KNOWN_STEPS
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.numerics.adafactor import AdafactorHyperparameters, own_learning_rate
from entropy_core.numerics.adamw import AdamHyperparameters
from entropy_core.numerics.lion import LionHyperparameters
from entropy_core.numerics.muon import MuonHyperparameters
from entropy_core.numerics.sgd import SGDHyperparameters

Group = dict[str, Any]
Shape = tuple[int, ...]

RULE = "rule"
"""Key of a group: the name of its rule, see `numerics.rules`."""

OTHER_OPTIMIZERS = {
    "momentum_buffer": "SGD with momentum, or Muon",
    "square_avg": "RMSprop or Adadelta",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "torch's Adafactor",
    "state1": "an optimizer of bitsandbytes",
    "sum": "Adagrad",
    "ax": "ASGD",
    "prev": "Rprop",
    "exp_avg_diff": "Adan",
    "z": "a schedule-free optimizer",
    "Q": "SOAP or Shampoo",
    "projector": "GaLore",
}

_REQUIRED = {
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "muon": ("lr", "momentum", "weight_decay", "nesterov", "ns_coefficients", "ns_steps", "eps"),
    "adafactor": ("eps", "weight_decay"),
}
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance")
"""Moments that cannot be negative."""


def recognised(saved: SavedOptimizer) -> SavedOptimizer:
    """Say of every group which rule makes its step.

    Args:
        saved: what the file holds.

    Returns:
        The same, with `RULE` in every group; slots of SGD without momentum are those of its groups, and empty.

    Raises:
        CheckpointError: an optimizer is none of those whose step is known, has not made a step, or lacks
            hyperparameters.
    """
    path, slots, groups = saved
    if not any(slots.values()) and any(_rule(group, {"exp_avg", "exp_avg_sq"}) == "adamw" for group in groups):
        raise CheckpointError(
            f"{path} has no slots", cause="saved before the first step", fix="probe a later checkpoint"
        )
    named = []
    for number, group in enumerate(groups):
        kinds = {key for index in group["params"] for key in slots.get(index, {})}
        rule = _rule(group, kinds)
        if rule is None:
            kinds = kinds or {key for slot in slots.values() for key in slot}
            raise _refused(path, kinds)
        if lacking := [key for key in _REQUIRED[rule] if group.get(key) is None]:
            fact = f"{path} has no {', '.join(lacking)} in param group {number}"
            raise CheckpointError(fact, cause="an optimizer other than torch's AdamW", fix=KNOWN_STEPS)
        if rule == "adamw" and "amsgrad" not in group:  # RAdam and fused third-party variants have Adam's slots
            raise CheckpointError(
                f"{path} has no amsgrad in param group {number}, so that it is not torch's Adam or AdamW",
                cause="RAdam or a third-party optimizer with the same slots",
                fix=KNOWN_STEPS,
            )
        named.append(group | {RULE: rule})
    without_moments = {index for group in named if not _has_moments(group) for index in group["params"]}
    kept = {index: {} if index in without_moments else slot for index, slot in slots.items()}
    return SavedOptimizer(path, kept | {index: {} for index in without_moments}, named)


def _rule(group: Group, kinds: set[str]) -> str | None:
    """By the keys of a group, and by those of its slots, of which a frozen group has none."""
    if "ns_steps" in group and "ns_coefficients" in group:
        return "muon" if kinds <= {"momentum_buffer"} else None
    if {"momentum", "dampening", "nesterov"} <= group.keys():
        return "sgd" if kinds <= {"momentum_buffer"} else None
    if "beta2_decay" in group:
        return "adafactor" if kinds <= {"step", "row_var", "col_var", "variance"} else None
    if {"clip_threshold", "decay_rate", "relative_step"} <= group.keys():
        moments = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"}
        return "adafactor" if kinds <= {"step", "RMS"} | moments else None
    if "eps" not in group and "betas" in group and kinds | {"step"} == {"step", "exp_avg"}:
        return "lion"
    moments = {"exp_avg", "exp_avg_sq"}
    if "betas" in group or kinds:
        return "adamw" if not kinds or moments <= kinds <= moments | {"step", "max_exp_avg_sq"} else None
    return None


def _refused(path: Path, kinds: set[str]) -> CheckpointError:
    known = [of for key, of in OTHER_OPTIMIZERS.items() if key in kinds]
    known += ["Lion"] * (kinds == {"exp_avg"}) + ["another optimizer"]
    return CheckpointError(
        f"{path} is not the state of an optimizer whose step is known: its slots are "
        f"{some_names(sorted(kinds)) or 'empty'}",
        cause=f"the run used {known[0]}",
        fix=KNOWN_STEPS,
    )


def _has_moments(group: Group) -> bool:
    return group[RULE] != "sgd" or as_float(group["momentum"]) != 0


def is_square(key: str) -> bool:
    """Whether a moment is a mean of squares, and so not negative."""
    return key in _SQUARES


def moment_shapes(group: Group, shape: Shape) -> dict[str, Shape]:
    """The moments that the next step of a parameter needs, and their shapes.

    Args:
        group: a group with its rule.
        shape: of a parameter in it.

    Returns:
        Key of the slot → shape.
    """
    rule = group[RULE]
    if rule == "adamw":
        return dict.fromkeys(("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])), shape)
    if rule in ("sgd", "muon"):
        return {"momentum_buffer": shape} if _has_moments(group) else {}
    if rule == "lion":
        return {"exp_avg": shape}
    if "beta2_decay" in group:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    found = {"exp_avg_sq": shape}
    if len(shape) >= 2:
        found = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}
    return found | ({} if group.get("beta1") is None else {"exp_avg": shape})


def learning_rate_of(path: Path, group: Group, slots: list[dict[str, Any]]) -> float:
    """The learning rate of a group; the one that Adafactor with `relative_step` gives itself for the next step.

    Raises:
        CheckpointError: it is not a finite number from 0 on.
    """
    if group[RULE] == "adafactor" and group.get("relative_step"):
        steps = {as_float(slot.get("step")) for slot in slots}
        if len(steps) != 1:
            fact = f"{path} has parameters at different steps, and an Adafactor whose learning rate depends on the step"
            raise CheckpointError(fact, cause="parameters that were frozen for a time", fix=KNOWN_STEPS)
        step = steps.pop()
        return own_learning_rate(int(step) + 1, bool(group.get("warmup_init"))) if step >= 1 else math.nan
    rate = as_float(group.get("lr"))
    if not 0 <= rate < math.inf:
        raise _out_of_range(path, group)
    return rate


def hyperparameters(path: Path, group: Group, rate: float, relative: float, moments: list[Any]) -> Any:
    """What the next step of a group's parameters depends on.

    Args:
        path: of the file, for errors.
        group: a group with its rule.
        rate: its learning rate.
        relative: the same over the nominal one.
        moments: of its parameters.

    Returns:
        The hyperparameters of its rule.

    Raises:
        CheckpointError: one of them is no number, or out of range.
    """
    try:
        found = _READ[group[RULE]](group, rate, relative, moments)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _out_of_range(path, group) from error
    return found


def _out_of_range(path: Path, group: Group) -> CheckpointError:
    keys = ["lr", *(key for key in group if key not in ("lr", "params", "param_names", RULE))]
    said = ", ".join(f"{key} {group.get(key)}" for key in keys)
    return CheckpointError(f"{path} has hyperparameters out of range: {said[:500]}", fix=SAVE_AGAIN)


def _number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number, at least `low` and less than `high`."""
    number = as_float(value)
    if not (math.isfinite(number) and low <= number < high):
        raise ValueError(value)
    return number


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return _number(beta1, 0, 1), _number(beta2, 0, 1)


def _adamw(group: Group, rate: float, relative: float, moments: list[Any]) -> AdamHyperparameters:
    return AdamHyperparameters(
        *_betas(group),
        eps=_number(group["eps"], 0),
        weight_decay=_number(group["weight_decay"]),
        relative_lr=relative,
        maximize=bool(group.get("maximize", False)),
        decoupled=bool(group.get("decoupled_weight_decay", True)),
        amsgrad=bool(group["amsgrad"]),
    )


def _sgd(group: Group, rate: float, relative: float, moments: list[Any]) -> SGDHyperparameters:
    return SGDHyperparameters(
        momentum=_number(group["momentum"], 0),
        dampening=_number(group["dampening"]),
        nesterov=bool(group["nesterov"]),
        weight_decay=_number(group["weight_decay"]),
        relative_lr=relative,
        maximize=bool(group.get("maximize", False)),
    )


def _lion(group: Group, rate: float, relative: float, moments: list[Any]) -> LionHyperparameters:
    return LionHyperparameters(_betas(group)[0], _number(group["weight_decay"]), relative)


def _muon(group: Group, rate: float, relative: float, moments: list[Any]) -> MuonHyperparameters:
    a, b, c = (_number(x) for x in group["ns_coefficients"])
    scale = group.get("adjust_lr_fn")
    if scale not in (None, "original", "match_rms_adamw") or any(len(moment.shape) != 2 for moment in moments):
        raise ValueError(scale)
    return MuonHyperparameters(
        momentum=_number(group["momentum"], 0),
        weight_decay=_number(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        coefficients=(a, b, c),
        ns_steps=int(_number(group["ns_steps"], 0, 100)),
        eps=_number(group["eps"], 0),
        match_rms_adamw=scale == "match_rms_adamw",
        relative_lr=relative,
    )


def _adafactor(group: Group, rate: float, relative: float, moments: list[Any]) -> AdafactorHyperparameters:
    eps1, eps2 = group["eps"]
    common: dict[str, Any] = {
        "eps2": _number(eps2, 0),
        "weight_decay": _number(group["weight_decay"]),
        "lr": _number(rate, 0),
    }
    if "beta2_decay" in group:
        if eps1 is None:  # torch takes that of the parameter's dtype, which the moments have
            dtypes = {moment.dtype for moment in moments if isinstance(moment, Moment)}
            (eps1,) = [torch.finfo(dtype).eps for dtype in dtypes]
        return AdafactorHyperparameters(
            eps1=_number(eps1, 0),
            clip_threshold=_number(group["d"], 1),
            decay_rate=_number(group["beta2_decay"], high=1e-300),
            of_torch=True,
            relative_lr=relative,
            maximize=bool(group.get("maximize", False)),
            **common,
        )
    return AdafactorHyperparameters(
        eps1=_number(eps1, 0),
        clip_threshold=_number(group["clip_threshold"], 1e-300),
        decay_rate=_number(group["decay_rate"], high=1e-300),
        beta1=None if group.get("beta1") is None else _number(group["beta1"], 0, 1),
        scale_parameter=bool(group.get("scale_parameter", True)),
        relative_lr=relative,
        **common,
    )


_READ: dict[str, Callable[[Group, float, float, list[Any]], Any]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "muon": _muon,
    "adafactor": _adafactor,
}


def as_float(value: Any) -> float:
    """A number or a one-element tensor as a float; NaN for anything else, or what no float can hold."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    try:
        return float(value) if is_number else math.nan
    except (OverflowError, RuntimeError):
        return math.nan
