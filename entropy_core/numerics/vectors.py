"""Parameter-sized vectors, processed in blocks so that no whole vector is in memory.

A vector is a mapping from keys to tensors; a key is the name of a parameter or a `Block` of one. A `Lazy` vector
computes each tensor on access, so an elementwise function of other vectors is never stored. Sums run in the order of
the keys, in float64.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

BLOCK = 2**15
"""Numbers per block: few enough that several float64 arrays fit in a core's cache, enough to amortise an operation."""

DEVICE_BLOCK = 2**22
"""The same on a GPU, where the launch of an operation costs as much as the arithmetic on a million numbers."""

GRADIENT_BYTES = 2**27
"""What gradients may take that are computed together, with forward passes that they share."""

K = TypeVar("K", bound=Any)  # a name or a Block: anything that can be sorted


class Block(NamedTuple):
    """The slice `start:stop` of a flattened parameter."""

    name: str
    start: int
    stop: int


class Lazy(Mapping[K, Tensor]):
    """A vector whose tensors are computed on every access.

    Args:
        keys: keys of the vector.
        make: computes the tensor of a key.
    """

    def __init__(self, keys: Collection[K], make: Callable[[K], Tensor]) -> None:
        self._keys, self._make = keys, make

    def __getitem__(self, key: K) -> Tensor:
        return self._make(key)

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def gradients_at_once(numbers: int) -> int:
    """How many gradients of this many numbers, in float64, are computed together: at least one, however large."""
    return max(1, GRADIENT_BYTES // (8 * max(numbers, 1)))


def blocks_of(tensors: Mapping[str, Tensor]) -> tuple[Block, ...]:
    """Cut parameters into blocks of at most `BLOCK` numbers (`DEVICE_BLOCK` on a GPU), in the order of their names."""

    def cut(name: str) -> Iterator[Block]:
        count, size = tensors[name].numel(), BLOCK if tensors[name].device.type == "cpu" else DEVICE_BLOCK
        return (Block(name, start, min(start + size, count)) for start in range(0, count, size))

    return tuple(block for name in sorted(tensors) for block in cut(name))


def in_blocks(tensors: Mapping[str, Tensor]) -> Lazy[Block]:
    """View a vector in blocks, converted to float64.

    Args:
        tensors: the vector, by parameter name.

    Returns:
        Flat tensors by block, on the device of the vector; views if the vector is already float64.
    """
    flat = {name: tensor.detach().reshape(-1) for name, tensor in tensors.items()}
    return Lazy(blocks_of(flat), lambda block: flat[block.name][block.start : block.stop].double())


def times(factor: float, vector: Lazy[K]) -> Lazy[K]:
    """Return the vector times a number."""
    return Lazy(list(vector), lambda key: factor * vector[key])


def remembered(vector: Lazy[K]) -> Lazy[K]:
    """Return the vector with the tensor that was asked for last kept, for what asks for it again at once."""
    last: dict[K, Tensor] = {}

    def one(key: K) -> Tensor:
        if key not in last:
            last.clear()
            last[key] = vector[key]
        return last[key]

    return Lazy(list(vector), one)


def dots(pairs: Sequence[tuple[Mapping[K, Tensor], Mapping[K, Tensor]]]) -> list[float]:
    """Return ⟨a, b⟩ of several pairs over the same keys, key by key, so that what they share is computed once."""
    totals = [0.0] * len(pairs)
    for key in sorted(pairs[0][0]) if pairs else ():
        for place, (a, b) in enumerate(pairs):
            totals[place] += float((a[key].double() * b[key].double()).sum())
    return totals


def dot(a: Mapping[K, Tensor], b: Mapping[K, Tensor]) -> float:
    """Return ⟨a, b⟩ over the keys of a."""
    return dots([(a, b)])[0]


def global_norm(a: Mapping[K, Tensor]) -> float:
    """Return ‖a‖₂."""
    return sum(squares(a[key]) for key in sorted(a)) ** 0.5


def squares(tensor: Tensor) -> float:
    """Return the sum of the squares of a tensor, computed in float64."""
    wide = tensor.double()
    return float((wide * wide).sum())
