"""Tensors where they lie in a file, and what a rank holds of one, as an inert pickle describes them.

StoredTensor     a tensor in a mapped file
ShardOfTensor    the pieces of a DTensor or ShardedTensor that one rank holds
"""

import ctypes
import math
import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.inert_pickle import Inert

_madvise = getattr(ctypes.CDLL(None), "madvise", None)  # the system's own function, where there is one


class StoredTensor(NamedTuple):
    """A tensor where it lies.

    Attributes:
        storage: bytes of its storage, in a private map of the file.
        dtype: of its numbers.
        shape: of it.
        strides: in numbers, from one element to the next along each axis.
        offset: numbers of the storage before its first.
    """

    storage: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def flat(self, start: int, stop: int) -> Tensor:
        """Read a piece of it.

        Args:
            start: first number of the flat tensor.
            stop: number after the last.

        Returns:
            A new flat tensor of its dtype.
        """
        size = self.dtype.itemsize
        if self.flat_in_file():
            first, last = self.offset + start, self.offset + stop
            return self.storage[first * size : last * size].clone().view(self.dtype)
        numbers = self.storage.clone().view(self.dtype)
        return torch.as_strided(numbers, self.shape, self.strides, self.offset).reshape(-1)[start:stop].clone()

    def flat_in_file(self) -> bool:
        """Whether its numbers lie one behind the other."""
        return self.strides == _contiguous(self.shape)

    def release(self) -> None:
        """Take the mapped bytes out of memory; when they are used again, the file is read again."""
        release(self.storage)


class ShardOfTensor(NamedTuple):
    """What one rank holds of a DTensor or ShardedTensor.

    Attributes:
        shape: of the whole tensor.
        pieces: of it, on this rank.
        offsets: where each piece begins in the whole; None where the rank alone says it.
        axis: that is cut into equal chunks, by rank; None where every rank holds the whole.
    """

    shape: tuple[int, ...]
    pieces: tuple[StoredTensor, ...]
    offsets: tuple[tuple[int, ...], ...] | None
    axis: int | None


def plain_dict(value: Any) -> dict[Any, Any]:
    """A dictionary, be it an ordered one; empty for anything else."""
    if isinstance(value, Inert):
        return value.items
    return value if isinstance(value, dict) else {}


def fields(value: Any) -> dict[Any, Any]:
    """The attributes of a record; none of anything else."""
    state = value.state if isinstance(value, Inert) else None
    if isinstance(state, list) and len(state) == 2 and state[0] is None:  # of a class with slots
        state = state[1]
    return state if isinstance(state, dict) else {}


def integers(value: Any) -> tuple[int, ...] | None:
    """A tuple of numbers that are not negative, be it a `torch.Size`; None for anything else."""
    if isinstance(value, Inert) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if isinstance(value, list) and all(type(x) is int and 0 <= x < 2**62 for x in value):
        return tuple(value)
    return None


def release(tensor: Tensor) -> None:
    """Take a contiguous tensor in a private map of a file out of memory; when it is used again, the file is read again.

    Pages of a mapped file count as this process's memory from when they were touched until the file is closed. The map
    is private and never written to, so what is dropped is what the file holds.
    """
    if _madvise is not None and tensor.is_contiguous():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), mmap.MADV_DONTNEED)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def shard_of_dtensor(arguments: list[Any], state: Any) -> ShardOfTensor:
    """Read a DTensor from the arguments of `_rebuild_wrapper_subclass(type, dtype, shape, …)` and its state.

    Raises ValueError if it does not say how it is cut, or is cut along several axes.
    """
    given = state[1] if isinstance(state, list) and len(state) == 2 else state
    shape = integers(arguments[2]) if len(arguments) > 2 else None
    local = plain_dict(given).get("_local_tensor")
    placements = fields(plain_dict(given).get("_spec")).get("placements")
    if shape is None or not isinstance(local, StoredTensor) or not isinstance(placements, list):
        raise ValueError("it has a DTensor that does not say how it is cut")
    axes: list[int] = []
    for placement in placements:
        kind = placement.name.rpartition(".")[2] if isinstance(placement, Inert) else ""
        if kind == "Shard" and type(fields(placement).get("dim")) is int:
            axes.append(fields(placement)["dim"] % max(len(shape), 1))
        elif kind != "Replicate":
            raise ValueError(f"it has a DTensor that is {kind or 'placed nowhere'}")
    if len(axes) > 1 or (axes and len(placements) > 1):
        raise ValueError("it has a DTensor on a mesh of several axes, which is not read")
    return ShardOfTensor(shape, (local,), None, axes[0] if axes else None)


def shard_of_sharded(state: Any) -> ShardOfTensor:
    """Read a `ShardedTensor` from its state: its local shards, and the size of the whole.

    Raises ValueError if it does not say how it is cut.
    """
    shards, metadata = state[:2] if isinstance(state, list) and len(state) >= 2 else (None, None)
    shape = integers(fields(metadata).get("size"))
    pieces, offsets = [], []
    for shard in shards if isinstance(shards, list) else ():
        of_shard = fields(shard)
        where = of_shard.get("metadata")
        begins = integers(fields(where).get("shard_offsets"))
        if not isinstance(of_shard.get("tensor"), StoredTensor) or begins is None:
            raise ValueError("it has a ShardedTensor that does not say how it is cut")
        pieces.append(of_shard["tensor"])
        offsets.append(begins)
    if shape is None:
        raise ValueError("it has a ShardedTensor that does not say how it is cut")
    return ShardOfTensor(shape, tuple(pieces), tuple(offsets), None)
