"""What `training_args.bin` says: the trainer's own settings, as plain values. It is a pickle, and is not unpickled."""

import io
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.checkpoints.inert_pickle import MOST_BYTES, Inert, PickleError, operations, plain, read_pickle
from entropy_core.errors import CheckpointError, one_line

ENTROPY_CONTROL = "entropy_ctrl_state.json"
TRAINING_ARGUMENTS = "training_args.bin"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its archives
DAMAGED = (PickleError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading a file that is cut off, or something else, may raise."""


class TrainingArguments(NamedTuple):
    """The settings of a trainer.

    Attributes:
        kind: the class that held them, such as `trl.trainer.grpo_config.GRPOConfig`.
        values: by name; what is no plain value is `Inert`.
    """

    kind: str
    values: dict[str, Any]


def read_training_arguments(path: Path) -> TrainingArguments:
    """Read the settings of a trainer; nothing in the file is imported or executed, whatever it is.

    Args:
        path: of `training_args.bin`.

    Returns:
        The class and its values.

    Raises:
        CheckpointError: the file is damaged, too large, or holds something else.
    """
    try:
        record = read_pickle(pickle_in(path))
        if not isinstance(record, Inert) or not isinstance(record.state, dict):
            raise PickleError("it holds no record of settings")
        values = plain(record.state)
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} cannot be read as the settings of a trainer: {one_line(error)}",
            cause="the save was interrupted, or the file is something else; nothing in it was executed",
            fix="move the file away, and say in the configuration what it would have said",
        ) from error
    return TrainingArguments(record.name, {name: value for name, value in values.items() if isinstance(name, str)})


def pickle_in(path: Path) -> bytes:
    """Return the pickle in an archive of torch.save, or in a file of the time before these archives.

    Raises:
        PickleError: it is neither; or one of `DAMAGED`.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise PickleError(f"it is no file of at most {MOST_BYTES} bytes")
    content = path.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return _after_legacy_header(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise PickleError("it is an archive of something else")
        with archive.open(found[0]) as file:  # no more is unpacked than is allowed, whatever size the archive says
            return file.read(MOST_BYTES + 1)


def _after_legacy_header(content: bytes) -> bytes:
    """Skip what torch.save once wrote before the object: a magic number, a version, and the machine's sizes."""
    if read_pickle(content) != _LEGACY_MAGIC:
        return content
    for _ in range(3):
        *_, (_, _, last) = operations(content)
        content = content[last + 1 :]
    return content
