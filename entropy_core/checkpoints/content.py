"""What the files of a checkpoint say: JSON, and the tensors of safetensors files, from their headers or whole."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from entropy_core.errors import CheckpointError, one_line, shortage, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.files.regular import require_readable

if TYPE_CHECKING:
    from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else.
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object", fix=SAVE_AGAIN)
    return content


def read_names(path: Path) -> list[str]:
    """The JSON list of names in a file.

    Args:
        path: the file.

    Returns:
        The names.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else.
    """
    content = _json(path)
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} is not a JSON list of names", fix=SAVE_AGAIN)
    return content


def _json(path: Path) -> Any:
    try:
        return json.loads(require_readable(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        refused = CheckpointError(f"{path} is not readable JSON: {one_line(error)}", fix=SAVE_AGAIN)
        raise shortage(error) or refused from error


class StoredTensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, such as F32 or BF16
    file: str  # that it is in


def stored_tensors(directory: Path, single: str = "model.safetensors") -> dict[str, StoredTensor]:
    """Shapes and dtypes of the stored tensors, from the headers of the safetensors files; no weight is read.

    Args:
        directory: of a model or of an adapter.
        single: the file that holds all of them; where it is not, the shards that its index names.

    Returns:
        By name.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is not in the shard that the index names.
    """
    from safetensors import SafetensorError, safe_open

    index = f"{single}.index.json"
    expected: dict[str, str] = {}
    shards = [single]
    if not (directory / single).exists() and (directory / index).exists():  # transformers prefers the single file, too
        expected = read_json(directory / index).get("weight_map") or {}
        if not isinstance(expected, dict) or not expected:
            raise CheckpointError(f"{directory / index} has no weight_map", fix=SAVE_AGAIN)
        if wrong := [str(shard) for shard in expected.values() if not is_file_name(shard)]:
            raise CheckpointError(
                f"{directory / index} names shards that are not files beside it: {some_names(dict.fromkeys(wrong))}",
                cause="the index was edited, or belongs to another folder",
                fix="have all shards in one folder, under plain names",
            )
        shards = sorted(set(expected.values()))
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        try:
            with safe_open(require_readable(directory / shard), framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    header = file.get_slice(name)
                    found[name] = StoredTensor(tuple(header.get_shape()), header.get_dtype(), shard)
        except (SafetensorError, OSError) as error:
            raise shortage(error) or CheckpointError(
                f"{directory / shard} cannot be opened as safetensors: {one_line(error)}",
                cause="the save or the copy was interrupted",
                fix=SAVE_AGAIN,
            ) from error
    if lost := [name for name, shard in expected.items() if name not in found or found[name].file != shard]:
        raise CheckpointError(
            f"{directory}: tensors are not in the shard that {index} names: {some_names(lost)}",
            cause="shards of two saves are mixed",
            fix=SAVE_AGAIN,
        )
    return found


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether a name that a file gives can be that of a file beside it, and leads nowhere else."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & {*"/\\"}


def load_tensor(path: Path, name: str) -> "Tensor":
    """One tensor of a safetensors file, on the CPU, in the dtype that it was saved in."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of one safetensors file, on the CPU, in the dtype that they were saved in."""
    from safetensors.torch import load_file

    return load_file(path)
