"""Which optimizer a state is of, from its own keys, and which moments its next step needs.

    recognised        the name of the rule of every group, and slots that hold nothing but its moments
    moment_shapes     the moments that the next step of a parameter needs

An optimizer that none of this fits is refused by its own name.
"""

from pathlib import Path
from typing import Any

from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.layouts.single_file import KNOWN_STEPS, OF_BITSANDBYTES
from entropy_core.checkpoints.optimizer_settings import RULE, Group, as_float
from entropy_core.errors import CheckpointError, some_names

Shape = tuple[int, ...]

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
_OF_LAMB = ("grad_averaging", "max_grad_norm", "max_coeff")  # of apex or DeepSpeed, whose slots are those of Adam
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
    slots, groups = _of_apex(path, slots, groups)
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


def _of_apex(path: Path, slots: dict[Any, Group], groups: list[Group]) -> tuple[dict[Any, Group], list[Group]]:
    """The same with apex's FusedAdam as torch's: it has no amsgrad, and counts the steps of a group."""
    slots, found = dict(slots), []
    for group in groups:
        of_apex = "bias_correction" in group and not group.keys() & {"amsgrad", *_OF_LAMB}
        if of_apex and group["bias_correction"] is not True:
            fact = f"{path} is the state of an Adam without bias correction, whose step is not known"
            raise CheckpointError(fact, cause="apex's FusedAdam with bias_correction=False", fix=KNOWN_STEPS)
        if of_apex and "step" in group:
            slots |= {i: {"step": group["step"], **slots[i]} for i in group["params"] if slots.get(i)}
        found.append({"amsgrad": False, **group} if of_apex else group)
    return slots, found


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


def moments_tell(group: Group) -> bool:
    """Whether moments have the dtype of their weights: those of bitsandbytes and Adafactor have one of their own."""
    return group[RULE] != "adafactor" and not group.get(OF_BITSANDBYTES)


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
