"""The optimizer's state in a trainer's files; no code in them is run."""

from pathlib import Path

import torch
from torch import Tensor

from entropy_core.checkpoints.layouts.interface import SavedOptimizer, understood
from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.checkpoints.optimizer_rules import recognised
from entropy_core.checkpoints.pieces import Moment
from entropy_core.checkpoints.stored_tensors import release

LATEST = 2**53
"""A step that no run comes to."""
STRIDE = 2**16  # numbers of a moment that are in memory at one time, more or less: to take each block out takes long

SAVE_NAMES = "build the optimizer from named parameters and save again"


def load_optimizer(path: Path) -> SavedOptimizer:
    """Load the optimizer's state without running code from its files.

    Args:
        path: of `optimizer.pt`, or whatever `layouts.places` found in its place.

    Returns:
        Slots and groups; the tensors are on the CPU and map their files privately. Each group says which rule makes
        its step, see `optimizer_rules`.

    Raises:
        CheckpointError: a file is missing or damaged, or a pickle with code; the optimizer's step is not known, or it
            has not made one, or lacks hyperparameters.
    """
    with understood(path):
        return recognised(open_state(path).optimizer())


class SavedMoments:
    """The moments of an optimizer, read a block at a time from where they are.

    Args:
        path: of the file or folder, which was accepted by `load_optimizer` before.
    """

    def __init__(self, path: Path) -> None:
        self._slots = list(load_optimizer(path).slots.values())

    def read(self, slot: int, key: str, start: int, stop: int) -> Tensor | None:
        """Read a piece of a moment.

        Args:
            slot: place of the parameter's slot in the file.
            key: of the moment in the slot.
            start: first number of the flat moment.
            stop: number after the last; more than there are for all of them.

        Returns:
            A flat float64 tensor; None where the slot has no such moment.
        """
        moment = self._slots[slot].get(key)
        if moment is None:
            return None
        stop = min(stop, moment.numel())
        if not isinstance(moment, Tensor):
            return moment.flat(start, stop).to(torch.float64)
        flat = moment.reshape(-1)
        copy = flat[start:stop].to(torch.float64, copy=True)
        if moment.is_contiguous() and stop % STRIDE == 0:  # else it is a copy that is flat
            release(flat[min(start, stop - STRIDE) : stop])
        if stop == moment.numel():
            release(moment)
        return copy

    def whole(self, slot: int, key: str) -> Tensor | None:
        """Read a moment in its shape, float64; None where the slot has no such moment."""
        moment = self._slots[slot].get(key)
        if moment is None:
            return None
        read = self.read(slot, key, 0, moment.numel())
        return None if read is None else read.view(*moment.shape)


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
