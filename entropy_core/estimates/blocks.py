"""Blocks of sequences, read anew in each pass, and what is put together of them for each functional."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from entropy_core.numerics.functional import Functional

KEPT_BYTES = 2**26
"""How much of a batch stays in memory between two passes."""
Block = TypeVar("Block")


class Kept(Generic[Block]):
    """Blocks of tensors, to be iterated over in several passes; the first ones stay in memory, up to `KEPT_BYTES`.

    Args:
        loads: functions that each load one block.
    """

    def __init__(self, loads: Sequence[Callable[[], Block]]) -> None:
        self._loads, self._room = loads, KEPT_BYTES
        self._kept: dict[int, Block] = {}

    def __call__(self) -> Iterator[Block]:
        """Begin a pass."""
        for i, load in enumerate(self._loads):
            if i in self._kept:
                yield self._kept[i]
                continue
            block = load()
            if (size := _bytes(block)) <= self._room and i not in self._kept:
                self._kept[i] = block
                self._room -= size
            yield block


def _bytes(block: Any) -> int:
    """Of all tensors in tuples and dicts."""
    if isinstance(block, Tensor):
        return block.nbytes
    parts = block.values() if isinstance(block, Mapping) else block if isinstance(block, tuple) else ()
    return sum(map(_bytes, parts))


def laid_out(parts: Iterable[dict[Functional, Any]]) -> dict[Functional, Any]:
    """Concatenate the per-sequence columns of all blocks, for each functional."""
    blocks = list(parts)

    def joined(columns: list[Any]) -> Any:
        if isinstance(columns[0], Tensor):
            return torch.cat(columns)
        return type(columns[0])(*map(torch.cat, zip(*columns, strict=True)))

    return {functional: joined([block[functional] for block in blocks]) for functional in blocks[0]}


def added(of_blocks: Iterable[dict[Functional, Any]]) -> dict[Functional, Any]:
    """Add the totals of all blocks, for each functional."""
    return reduce(lambda a, b: {functional: total.plus(b[functional]) for functional, total in a.items()}, of_blocks)
