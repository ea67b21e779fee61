"""The optimizer's state in a trainer's files; no code in them is run, and only Adam is accepted."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.checkpoints.archives import release
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, understood
from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.checkpoints.layouts.single_file import USE_ADAMW
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, some_names
from entropy_core.numerics.adamw import AdamState

OTHER_OPTIMIZERS = {
    "momentum_buffer": "SGD with momentum, or Muon",
    "square_avg": "RMSprop or Adadelta",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "torch's Adafactor",
    "state1": "an optimizer of bitsandbytes",
    "sum": "Adagrad",
}
LATEST = 2**53
"""A step that no run comes to."""
STRIDE = 2**16  # numbers of a moment that are in memory at one time, more or less: to take each block out takes long

SAVE_NAMES = "build the optimizer from named parameters and save again"


def load_optimizer(path: Path) -> SavedOptimizer:
    """Load the optimizer's state without running code from its files.

    Args:
        path: of `optimizer.pt`, or whatever `layouts.places` found in its place.

    Returns:
        Slots and groups; the tensors are on the CPU and map their files privately.

    Raises:
        CheckpointError: a file is missing or damaged, or a pickle with code; the optimizer is not Adam or AdamW, has
            not made a step, or lacks hyperparameters.
    """
    with understood(path):
        saved = open_state(path).optimizer()
        _require_adam(*saved)
    return saved


def _require_adam(path: Path, slots: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    kinds = {key for slot in slots.values() for key in slot}
    foreign = sorted(kinds - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
    plain_sgd = not kinds and "momentum" in groups[0]
    if plain_sgd or foreign or (kinds and not {"exp_avg", "exp_avg_sq"} <= kinds):
        known = [OTHER_OPTIMIZERS[key] for key in foreign if key in OTHER_OPTIMIZERS]
        known += ["SGD"] * plain_sgd + ["Lion"] * (kinds == {"exp_avg"}) + ["another optimizer"]
        raise CheckpointError(
            f"{path} is not the state of Adam or AdamW: its slots are {some_names(sorted(kinds)) or 'empty'}",
            cause=f"the run used {known[0]}",
            fix=USE_ADAMW,
        )
    if not kinds:
        fact = f"{path} has no slots"
        raise CheckpointError(fact, cause="saved before the first step", fix="probe a later checkpoint")
    for number, group in enumerate(groups):
        if lacking := [key for key in ("lr", "betas", "eps", "weight_decay") if group.get(key) is None]:
            fact = f"{path} has no {', '.join(lacking)} in param group {number}"
            raise CheckpointError(fact, cause="an optimizer other than torch's AdamW", fix=USE_ADAMW)
        if "amsgrad" not in group:  # RAdam and fused third-party variants have Adam's slots and another rule
            raise CheckpointError(
                f"{path} has no amsgrad in param group {number}, so that it is not torch's Adam or AdamW",
                cause="RAdam or a third-party optimizer with the same slots",
                fix=USE_ADAMW,
            )


class SavedMoments:
    """The moments of an optimizer, read a block at a time from where they are.

    Args:
        path: of the file or folder, which was accepted by `load_optimizer` before.
    """

    def __init__(self, path: Path) -> None:
        self._slots = list(load_optimizer(path).slots.values())

    def state(self, slot: int, steps: int, amsgrad: bool, start: int, stop: int) -> AdamState:
        """Read the state of a piece of a parameter.

        Args:
            slot: place of the parameter's slot in the file.
            steps: taken so far.
            amsgrad: whether the largest second moment counts.
            start: first number of the flat parameter.
            stop: number after the last.

        Returns:
            Flat float64 tensors.
        """

        def piece(key: str) -> Tensor:
            moment = self._slots[slot][key]
            if not isinstance(moment, Tensor):
                return moment.flat(start, stop).to(torch.float64)
            flat = moment.reshape(-1)
            copy = flat[start:stop].to(torch.float64, copy=True)
            if moment.is_contiguous() and stop % STRIDE == 0:  # else it is a copy that is flat
                release(flat[min(start, stop - STRIDE) : stop])
            if stop == moment.numel():
                release(moment)
            return copy

        return AdamState(steps, piece("exp_avg"), piece("exp_avg_sq"), piece("max_exp_avg_sq") if amsgrad else None)


def range_of(moment: Moment) -> tuple[float, float]:
    """Read a moment, a part at a time, and take it out of memory again.

    Args:
        moment: of any dtype, with at least one number.

    Returns:
        Its least and its greatest number; NaN if any is NaN.
    """
    if isinstance(moment, Tensor):
        low, high = torch.aminmax(moment)
        release(moment)
        return float(low), float(high)
    starts = range(0, moment.numel(), STRIDE)
    ranges = torch.tensor(
        [[float(x) for x in torch.aminmax(moment.flat(i, min(i + STRIDE, moment.numel())))] for i in starts],
        dtype=torch.float64,
    )
    return float(ranges[:, 0].min()), float(ranges[:, 1].max())


def as_float(value: Any) -> float:
    """A number or a one-element tensor as a float; NaN for anything else, or what no float can hold."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    try:
        return float(value) if is_number else math.nan
    except (OverflowError, RuntimeError):
        return math.nan
