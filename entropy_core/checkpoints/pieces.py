"""Tensors that a checkpoint stores in pieces or in codes, read a block at a time.

Scattered   a tensor in pieces, each where its file has it
Quantised   codes of 8 or 4 bits, with a scale for each block of numbers
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints import content
from entropy_core.checkpoints.stored_tensors import StoredTensor

BLOCK = 256
"""Numbers that share a scale in 8-bit states."""


class Piece(NamedTuple):
    """A box of a tensor.

    Attributes:
        begins: where it begins, along each axis.
        sizes: of it, along each axis.
        find: the piece itself, when it is needed.
    """

    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    find: Callable[[], StoredTensor]


class Scattered:
    """A tensor in pieces that cover each of its numbers once.

    Args:
        shape: of it.
        dtype: of it.
        pieces: boxes of it; or intervals of the flat tensor, where they have one axis and it has not.

    Raises:
        ValueError: the pieces overlap, leave a gap, or lie outside.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        self.shape, self.dtype = shape, dtype
        grid = shape if all(len(piece.begins) == len(shape) for piece in pieces) else (math.prod(shape),)
        self._pieces = sorted((p for p in pieces if math.prod(p.sizes)), key=lambda piece: piece.begins)
        _require_partition(grid, self._pieces)
        row = math.prod(grid[1:])
        self._rows = all(piece.sizes[1:] == grid[1:] for piece in self._pieces)  # whole rows: intervals when flat
        self._starts = [piece.begins[0] * row if grid else 0 for piece in self._pieces]
        self._grid, self._row = grid, row

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether it holds numbers that are not whole."""
        return self.dtype.is_floating_point

    def flat(self, start: int, stop: int) -> Tensor:
        """Read a block.

        Args:
            start: first number of the flat tensor.
            stop: number after the last.

        Returns:
            A new flat tensor of its dtype.
        """
        if not self._rows:
            return self._of_boxes(start, stop)
        found = []
        place = max(bisect_right(self._starts, start) - 1, 0)
        while place < len(self._pieces) and self._starts[place] < stop:
            piece, begins = self._pieces[place], self._starts[place]
            first, last = max(start - begins, 0), min(stop - begins, math.prod(piece.sizes))
            found.append(self._read(piece, first, last))
            place += 1
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0, dtype=self.dtype)

    def whole(self) -> Tensor:
        """Read all of it, in its shape."""
        return self.flat(0, self.numel()).reshape(self.shape)

    def _of_boxes(self, start: int, stop: int) -> Tensor:
        """The same from pieces that hold parts of rows: all rows that the block touches, and of these the block."""
        first, last = start // self._row, -(-stop // self._row)
        rows = torch.empty((last - first, *self._grid[1:]), dtype=self.dtype)
        for piece in self._pieces:
            low, high = max(piece.begins[0], first), min(piece.begins[0] + piece.sizes[0], last)
            if low < high:
                inner = math.prod(piece.sizes[1:])
                values = self._read(piece, (low - piece.begins[0]) * inner, (high - piece.begins[0]) * inner)
                box = (slice(low - first, high - first), *map(_span, piece.begins[1:], piece.sizes[1:]))
                rows[box] = values.reshape(high - low, *piece.sizes[1:])
        return rows.reshape(-1)[start - first * self._row : stop - first * self._row].clone()

    def _read(self, piece: Piece, first: int, last: int) -> Tensor:
        stored = piece.find()
        numbers = stored.flat(first, last)
        if last == math.prod(piece.sizes):
            stored.release()
        return numbers.to(self.dtype)


class Quantised:
    """A moment in codes: number i is qmap[code_i] · absmax[i // block].

    bitsandbytes' 8-bit states have blocks of 256, torchao's 8-bit ones of 256 and its 4-bit ones of 128.

    Args:
        codes: uint8; of 4 bits, two in a byte, the first one in the upper half.
        qmap: the value of each code.
        absmax: the largest number of each block.
        shape: of the parameter; None: that of the codes.
        bits: of a code, 8 or 4.
        block: numbers that share a scale.

    Raises:
        ValueError: there are other numbers of them.
    """

    dtype = torch.float32

    def __init__(
        self,
        codes: Tensor | StoredTensor,
        qmap: Tensor,
        absmax: Tensor,
        shape: tuple[int, ...] | None = None,
        bits: int = 8,
        block: int = BLOCK,
    ) -> None:
        self.shape = tuple(codes.shape) if shape is None else shape
        if (
            codes.dtype != torch.uint8
            or codes.numel() * 8 != self.numel() * bits
            or qmap.shape != (2**bits,)
            or block < 1
            or absmax.shape != (-(-self.numel() // block),)
        ):
            raise ValueError(f"{codes.numel()} codes with {qmap.numel()} values and {absmax.numel()} scales")
        self._codes, self._qmap, self._absmax, self._bits, self._block = codes, qmap, absmax, bits, block

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether it holds numbers that are not whole: the codes stand for such."""
        return True

    def flat(self, start: int, stop: int) -> Tensor:
        """The numbers from `start` to `stop` of the flat tensor, float32."""
        if self._bits == 8:
            codes = self._stored(start, stop)
        else:
            pairs = self._stored(start // 2, -(-stop // 2))
            codes = torch.stack([pairs >> 4, pairs & 15], -1).view(-1)[start % 2 :][: stop - start]
        scales = self._absmax[torch.arange(start, stop).div_(self._block, rounding_mode="floor")]
        return self._qmap[codes.long()].float() * scales

    def _stored(self, start: int, stop: int) -> Tensor:
        if isinstance(self._codes, StoredTensor):
            return self._codes.flat(start, stop)
        return self._codes.reshape(-1)[start:stop]

    def whole(self) -> Tensor:
        """All of them, in its shape."""
        return self.flat(0, self.numel()).reshape(self.shape)


Moment = Tensor | Scattered | Quantised
"""What a slot of an optimizer may have as a moment."""


def in_one_piece(stored: StoredTensor) -> Scattered:
    """A tensor that lies in one place."""
    return Scattered(stored.shape, stored.dtype, [Piece((0,) * len(stored.shape), stored.shape, lambda: stored)])


def _span(begins: int, size: int) -> slice:
    return slice(begins, begins + size)


def _require_partition(grid: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Every number is in one piece: none outside, the right number of them, and no two boxes with a common number."""
    for piece in pieces:
        if any(low + size > whole for low, size, whole in zip(piece.begins, piece.sizes, grid, strict=True)):
            raise ValueError(f"a piece of {piece.sizes} at {piece.begins} lies outside of {grid}")
    held = sum(math.prod(piece.sizes) for piece in pieces)
    if held != math.prod(grid):
        raise ValueError(f"the pieces hold {held} numbers of {math.prod(grid)}")
    for index, piece in enumerate(pieces):
        for other in pieces[index + 1 :]:
            if other.begins and other.begins[0] >= piece.begins[0] + piece.sizes[0]:
                break  # sorted by where they begin: no later one overlaps either
            if all(a < b + n and b < a + m for a, m, b, n in zip(*piece[:2], *other[:2], strict=True)):
                raise ValueError(f"two pieces overlap at {other.begins}")


_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def headers_of(found: Mapping[str, Scattered], place: Path) -> dict[str, content.StoredTensor]:
    """Return what the header of a safetensors file would say of these tensors, which lie in a place; none is read."""
    return {
        name: content.StoredTensor(tensor.shape, _NAMES.get(tensor.dtype, str(tensor.dtype)), place.name)
        for name, tensor in found.items()
    }
