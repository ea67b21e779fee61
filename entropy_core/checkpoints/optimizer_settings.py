"""What one group of an optimizer says of the next step: its learning rate and its other hyperparameters."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.checkpoints.layouts.single_file import KNOWN_STEPS
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.numerics.adafactor import AdafactorHyperparameters, own_learning_rate
from entropy_core.numerics.adamw import AdamHyperparameters
from entropy_core.numerics.lion import LionHyperparameters
from entropy_core.numerics.muon import MuonHyperparameters
from entropy_core.numerics.sgd import SGDHyperparameters

Group = dict[str, Any]

RULE = "rule"
"""Key of a group: the name of its rule, see `numerics.rules`."""


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
