"""What `optimizer.pt` holds, by the optimizer's own numbering; no code in it is run, and only Adam is accepted."""

import ctypes
import math
import mmap
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.errors import CheckpointError, one_line, shortage, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.files.regular import require_readable
from entropy_core.numerics.adamw import AdamState

OTHER_OPTIMIZERS = {
    "momentum_buffer": "SGD with momentum, or Muon",
    "square_avg": "RMSprop or Adadelta",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "torch's Adafactor",
    "state1": "an optimizer of bitsandbytes, such as 8-bit AdamW",
    "sum": "Adagrad",
}
LATEST = 2**53
"""A step that no run comes to."""
STRIDE = 2**16  # numbers of a moment that are in memory at one time, more or less: to take each block out takes long
_madvise = getattr(ctypes.CDLL(None), "madvise", None)  # the system's own function, where there is one

SAVE_NAMES = "build the optimizer from named parameters and save again"
USE_ADAMW = "probe a checkpoint that was trained with torch's AdamW (optim='adamw_torch' or 'adamw_torch_fused')"


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
    if not _is_archive(path):
        raise CheckpointError(
            f"{path} is not a complete archive of torch.save, and was not read",
            cause="the save or the copy was interrupted, or it is a bare pickle",
            fix=SAVE_AGAIN,
        )
    if (order := _byte_order(path)) != sys.byteorder:
        fact = f"{path} was saved by a machine that is {order}-endian"
        raise CheckpointError(fact, fix="load it there and save it again from one like this")
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own message is not repeated: it recommends to switch the safety off
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and numbers ({code[1]}), and was not executed",
                cause="an optimizer that saves its own classes, or code from an untrusted source",
                fix=USE_ADAMW,
            ) from error
        fact = f"{path} cannot be read as tensors and numbers ({type(error).__name__})"
        raise shortage(error) or CheckpointError(fact, cause="a damaged file", fix=SAVE_AGAIN) from error
    saved = saved if isinstance(saved, dict) else {}
    slots, groups = saved.get("state"), saved.get("param_groups")
    is_state = isinstance(slots, dict) and all(isinstance(slot, dict) for slot in slots.values())
    is_list = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not (is_state and is_list and groups and all(isinstance(group.get("params"), list) for group in groups)):
        fact = f"{path} is not the state_dict of a torch optimizer (`state` and `param_groups`)"
        raise CheckpointError(fact, fix=USE_ADAMW)
    _require_adam(path, slots, groups)
    return SavedOptimizer(path, slots, groups)


def _is_archive(path: Path) -> bool:
    """Whether a file is a whole archive; `is_zipfile` takes one that cannot be opened for none."""
    try:
        with require_readable(path).open("rb") as file:
            return zipfile.is_zipfile(file)
    except OSError as error:
        refused = CheckpointError(f"{path} cannot be read: {one_line(error)}", fix=SAVE_AGAIN)
        raise shortage(error) or refused from error


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


def _byte_order(path: Path) -> str:
    """Of the tensors in an archive of torch.save: bytes that torch has to turn round are not those of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith("/byteorder")]
            return archive.read(found[0]).decode() if found else "little"
    except (zipfile.BadZipFile, OSError, ValueError):
        return sys.byteorder  # what is wrong is said by whoever reads the tensors


class SavedMoments:
    """The moments of an `optimizer.pt`, read a block at a time from where they are.

    Args:
        path: of the file, which was accepted by `load_optimizer` before.
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
            flat = moment.reshape(-1)
            copy = flat[start:stop].to(torch.float64, copy=True)
            if moment.is_contiguous() and stop % STRIDE == 0:  # else it is a copy that is flat
                release(flat[min(start, stop - STRIDE) : stop])
            if stop == moment.numel():
                release(moment)
            return copy

        return AdamState(steps, piece("exp_avg"), piece("exp_avg_sq"), piece("max_exp_avg_sq") if amsgrad else None)


def release(tensor: Tensor) -> None:
    """Take a contiguous tensor of `load_optimizer` out of memory; when it is used again, the file is read again.

    Pages of a mapped file count as this process's memory from when they were touched until the file is closed. The map
    is private and never written to, so what is dropped is what the file holds.
    """
    if _madvise is not None and tensor.is_contiguous():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), mmap.MADV_DONTNEED)


def as_float(value: Any) -> float:
    """A number or a one-element tensor as a float; NaN for anything else, or what no float can hold."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    try:
        return float(value) if is_number else math.nan
    except (OverflowError, RuntimeError):
        return math.nan
