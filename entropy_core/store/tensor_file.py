"""Safetensors files that are larger than the memory there is: read and written a tensor, or a block of one, at a time.

A file is 8 bytes of header length, a JSON header with the place of each tensor, and the tensors, one after the other.
What is written here is, byte for byte, what the safetensors library writes.
"""

import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_core.numerics.vectors import Block

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for, every time anew; open until it is forgotten.

    Args:
        path: the file, which is known to be sound.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        self._header = json.loads(os.pread(self._descriptor, length, 8))
        self._header.pop("__metadata__", None)
        self._first = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        shape = self._header[name]["shape"]
        return self.block(Block(name, 0, math.prod(shape))).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def block(self, block: Block) -> Tensor:
        """Read a piece of a tensor.

        Args:
            block: which.

        Returns:
            Flat, on the CPU, in the dtype of the file.
        """
        entry = self._header[block.name]
        piece = torch.empty(block.stop - block.start, dtype=_DTYPES[entry["dtype"]])
        room = piece.view(torch.uint8).numpy().data
        place = self._first + entry["data_offsets"][0] + block.start * piece.itemsize
        while room:
            count = os.preadv(self._descriptor, [room], place)
            if not count:
                raise OSError(f"the tensor {block.name} ends early in a file that was sound when it was opened")
            room, place = room[count:], place + count
        return piece


class TensorWriter:
    """A safetensors file that is filled a block at a time; closed when the `with` block is left.

    Args:
        path: the file, which is replaced.
        shapes: of the tensors, by name.
        dtype: of all of them.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        header, self._places, end = {}, {}, 0
        for name in sorted(shapes):
            start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
            self._places[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._dtype, self._first, self._path = dtype, 8 + len(text), path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._first + end)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, block: Block, values: Tensor) -> None:
        """Put a piece of a tensor in its place.

        Args:
            block: which.
            values: as many, on any device, of any dtype.
        """
        self._file.seek(self._first + self._places[block.name] + block.start * self._dtype.itemsize)
        self._file.write(values.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

    def reopen_unlinked(self) -> TensorFile:
        """Reopen for reading what was written, and unlink the file: its space is freed when the result is dropped."""
        self._file.close()
        found = TensorFile(self._path)
        self._path.unlink()
        return found
