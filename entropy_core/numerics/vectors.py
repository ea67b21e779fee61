"""Vectors that hold a number for every parameter, without ever holding one as a whole.

A vector is a mapping from keys to tensors. The keys are names of parameters, or blocks of them; a `Lazy` vector makes
each tensor when it is asked for, so that what is elementwise in other vectors is never stored. Sums run in the order of
the keys, in float64.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

BLOCK = 2**15
"""Numbers in a block: so few that some float64 arrays of them stay in a core's cache, and enough for an operation."""

K = TypeVar("K", bound=Any)  # a name or a Block: anything that can be sorted


class Block(NamedTuple):
    """A piece of a parameter: the numbers from `start` up to `stop` of its flat form."""

    name: str
    start: int
    stop: int


class Lazy(Mapping[K, Tensor]):
    """A vector whose tensors are made when they are asked for, every time anew.

    Args:
        keys: of the vector.
        make: gives the tensor of a key.
    """

    def __init__(self, keys: Collection[K], make: Callable[[K], Tensor]) -> None:
        self._keys, self._make = keys, make

    def __getitem__(self, key: K) -> Tensor:
        return self._make(key)

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def blocks_of(tensors: Mapping[str, Tensor]) -> tuple[Block, ...]:
    """Cut parameters into blocks of at most `BLOCK` numbers, in the order of their names."""
    return tuple(
        Block(name, start, min(start + BLOCK, tensors[name].numel()))
        for name in sorted(tensors)
        for start in range(0, tensors[name].numel(), BLOCK)
    )


def in_blocks(tensors: Mapping[str, Tensor]) -> Lazy[Block]:
    """The same vector by blocks: float64 on the CPU, whatever it is kept as.

    Args:
        tensors: by name.

    Returns:
        Flat tensors; those of a float64 vector on the CPU are views of it.
    """
    flat = {name: tensor.detach().reshape(-1) for name, tensor in tensors.items()}
    return Lazy(blocks_of(flat), lambda block: flat[block.name][block.start : block.stop].to("cpu", torch.float64))


def dot(a: Mapping[K, Tensor], b: Mapping[K, Tensor]) -> float:
    """⟨a, b⟩ over the keys of a."""
    return sum(float((a[key].double() * b[key].double()).sum()) for key in sorted(a))


def global_norm(a: Mapping[K, Tensor]) -> float:
    """‖a‖₂."""
    return sum(squares(a[key]) for key in sorted(a)) ** 0.5


def squares(tensor: Tensor) -> float:
    """The sum of the squares of a tensor, in float64."""
    wide = tensor.double()
    return float((wide * wide).sum())
