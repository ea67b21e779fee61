"""Tensors in archives of torch.save, found without unpickling them and mapped rather than read.

The pickle in an archive says where each tensor lies: `inert_pickle` writes that down, and the numbers are read from the
file when they are asked for. A window of a file can be an archive too, as in the files of torch's distributed
checkpoints.
"""

import io
import lzma
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.checkpoints.inert_pickle import PERSISTENT, Inert, PickleError, read_pickle
from entropy_core.checkpoints.stored_tensors import StoredTensor, integers, shard_of_dtensor, shard_of_sharded
from entropy_core.errors import CheckpointError, one_line, shortage
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.files.regular import require_readable

MOST_BYTES, MOST_STEPS, DEEPEST = 2**28, 2 * 10**7, 64
"""Of the pickle of a state: a large model on a thousand ranks needs a tenth of it."""
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DAMAGED = (PickleError, OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def map_file(path: Path) -> Tensor:
    """The bytes of a file in a private map, which is never written to. Raises CheckpointError if there is none."""
    try:
        size = os.stat(require_readable(path)).st_size
        storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def read_archive(path: Path, start: int = 0, length: int | None = None, mapped: Tensor | None = None) -> Any:
    """What an archive of torch.save holds; nothing in it is imported, called or built.

    Args:
        path: of the file.
        start: where the archive begins in it.
        length: of the archive in bytes; None: to the end of the file.
        mapped: the bytes of the file, from `map_file`; None: they are mapped for this archive alone.

    Returns:
        Plain values, with tuples and sets as lists; tensors as `StoredTensor` or `ShardOfTensor`; all else as `Inert`,
        torchao's moments among it, with their dtype and shape as arguments.

    Raises:
        CheckpointError: the file is damaged, or no such archive.
    """
    try:
        return _Archive(path, start, length, mapped).content()
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def read_state_pickle(path: Path) -> Any:
    """What a bare pickle describes, inert. Raises CheckpointError if it is damaged."""
    try:
        with require_readable(path).open("rb") as file:
            return read_pickle(file.read(MOST_BYTES + 1), MOST_BYTES, MOST_STEPS)
    except (PickleError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Exception:
    return shortage(error) or CheckpointError(
        f"{path} cannot be read as tensors and numbers: {one_line(error)}",
        cause="the save or the copy was interrupted, or it is not what it is called; nothing in it was executed",
        fix=SAVE_AGAIN,
    )


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if place < 0:
            raise ValueError("it begins before the file")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._place))
        self._file.seek(self._start + self._place)
        content = self._file.read(size)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class _Archive:
    """One archive: where its records lie, and the tensors that its pickle describes."""

    def __init__(self, path: Path, start: int, length: int | None, mapped: Tensor | None) -> None:
        with require_readable(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = size - start if length is None else length
            if start < 0 or length <= 0 or start + length > size:
                raise ValueError(f"it ends at byte {size}")
            window = _Window(file, start, length)
            with zipfile.ZipFile(io.BufferedReader(window)) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                found = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
                if len(found) != 1:
                    raise ValueError("it is an archive of something else")
                self._prefix = found[0].removesuffix("data.pkl")
                order = f"{self._prefix}byteorder"
                if order in entries and archive.read(order).decode("ascii", "replace") != sys.byteorder:
                    raise ValueError("it was saved by a machine with another order of bytes")
                with archive.open(found[0]) as pickled:  # no more is unpacked than is allowed, whatever it says
                    self._pickle = pickled.read(MOST_BYTES + 1)
                self._records = {
                    name: (start + _data_begins(window, entry), entry.file_size)
                    for name, entry in entries.items()
                    if entry.compress_type == zipfile.ZIP_STORED and name.startswith(f"{self._prefix}data/")
                }
        self._path, self._size, self._left = path, size, MOST_STEPS
        self._map = mapped

    def content(self) -> Any:
        return self._found(read_pickle(self._pickle, MOST_BYTES, MOST_STEPS), 0)

    def _found(self, value: Any, depth: int) -> Any:
        """The same, with tensors in the place of what describes them."""
        self._left -= 1
        if depth > DEEPEST or self._left < 0:
            raise ValueError("it is nested too deeply")
        if isinstance(value, dict):
            return {key: self._found(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._found(item, depth + 1) for item in value]
        if not isinstance(value, Inert):
            return value
        tensor = self._tensor(value, depth)
        if tensor is not None:
            return tensor
        if value.name == "collections.OrderedDict":
            return {key: self._found(item, depth + 1) for key, item in value.items.items()}
        if value.name == "torch.Size":
            return value
        found = [self._found(item, depth + 1) for item in (value.arguments, value.state, value.items)]
        return Inert(value.name, *found)

    def _tensor(self, value: Inert, depth: int) -> Any:
        function, arguments = value.name.rpartition(".")[2], value.arguments
        if function in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3") and len(arguments) >= 4:
            return self._stored(*arguments[:4])
        if function == "_rebuild_parameter" and arguments:
            return self._found(arguments[0], depth + 1)
        if function == "_rebuild_from_type_v2" and len(arguments) == 4:
            rebuilt, kind, of_it, state = arguments
            if isinstance(rebuilt, Inert) and isinstance(kind, Inert) and isinstance(of_it, list):
                if not rebuilt.name.endswith("_rebuild_wrapper_subclass"):
                    return self._found(Inert(rebuilt.name, of_it), depth + 1)
                given = self._found(state, depth + 1)
                if kind.name.startswith("torchao.optim."):
                    return Inert(kind.name, of_it[1:3], given)
                if kind.name.endswith(".ShardedTensor"):
                    return shard_of_sharded(given)
                return shard_of_dtensor(self._found(of_it, depth + 1), given)
        return None

    def _stored(self, storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
        """A tensor, once its place is known to be within its storage."""
        sizes, steps = integers(shape), integers(strides)
        said = storage.arguments[0] if isinstance(storage, Inert) and storage.name == PERSISTENT else None
        if not (isinstance(said, list) and len(said) == 5 and said[0] == "storage" and isinstance(said[1], Inert)):
            raise ValueError("it has a tensor without a storage")
        dtype = _STORAGES.get(said[1].name.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"it has a tensor of {said[1].name}")
        record = self._records.get(f"{self._prefix}data/{said[2]}")
        if record is None or sizes is None or steps is None or type(offset) is not int or len(sizes) != len(steps):
            raise ValueError("it has a tensor that lies nowhere")
        begins, length = record
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if offset < 0 or (math.prod(sizes) > 0 and last >= length // dtype.itemsize) or begins + length > self._size:
            raise ValueError("it has a tensor that ends outside of its storage")
        return StoredTensor(self._bytes()[begins : begins + length], dtype, sizes, steps, offset)

    def _bytes(self) -> Tensor:
        """The whole file, mapped."""
        if self._map is None:
            self._map = map_file(self._path)
        return self._map


def _data_begins(window: _Window, entry: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins: behind its own header, whose length only that header says."""
    window.seek(entry.header_offset + 26)
    lengths = bytearray(4)
    window.readinto(lengths)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
