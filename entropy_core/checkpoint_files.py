"""The files of a checkpoint directory: which ones count, what they contain as digests, and whether all are there.

    find_checkpoints    glob patterns → directories, by step
    checkpoint_digest   one digest of every file that a result depends on
    weights_digest      one digest of the files that the policy depends on
    tokenizer_digest    one digest of the files that the tokenizer is made of
    stored_shapes       the tensors of the safetensors files, from their headers

A checkpoint is what `transformers.Trainer` and TRL write for full fine-tuning: `config.json`, `model.safetensors` (or
shards), `optimizer.pt`, `trainer_state.json`. `training_args.bin` is an executable pickle and is never opened.
"""

import glob
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from entropy_core.errors import CheckpointError, one_line, some_names

TOKENIZER_FILES = (
    "config.json",  # names the tokenizer's class where nothing else does
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
)
POLICY_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
)
RESULT_FILES = (*POLICY_FILES, "optimizer.pt", "trainer_state.json")
SAVE_AGAIN = "save the checkpoint again, or probe another one"

# --- finding ---------------------------------------------------------------------------------------------------------


def find_checkpoints(patterns: Sequence[str]) -> list[Path]:
    """The directories that the patterns match, each once.

    Args:
        patterns: directories or glob patterns (`**` included), absolute or relative to the working directory.

    Returns:
        The directories, by the trailing integer of their name (100 after 20; names without one last), then by path.

    Raises:
        CheckpointError: a pattern matches no directory.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        matches = [path] if os.path.isdir(path) else [m for m in glob.glob(path, recursive=True) if os.path.isdir(m)]
        if not matches:
            raise CheckpointError(
                f"No directory matches {pattern!r} (working directory {os.getcwd()})",
                way_out="correct the pattern; a run's checkpoints are usually RUN/checkpoint-*",
            )
        for match in sorted(matches):
            found.setdefault(Path(match).resolve(), Path(match))

    def by_step(path: Path) -> tuple[float, str]:
        digits = re.search(r"\d+$", path.resolve().name)
        return (int(digits[0]) if digits else math.inf), str(path)

    return sorted(found.values(), key=by_step)


# --- digests ---------------------------------------------------------------------------------------------------------

_digests: dict[tuple[int, int, int, int], str] = {}
_digests_lock = threading.Lock()


def file_digest(path: Path) -> str:
    """Content digest of one file, hashed once per process, and again when its inode, size or mtime has changed.

    Args:
        path: any file.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file, _digests_lock:
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if identity not in _digests:
            _digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        return _digests[identity]


def file_digests(directory: Path, patterns: Sequence[str] = RESULT_FILES) -> dict[str, str]:
    """Content digests of the files that a result depends on.

    Files that only matter to resuming the training are left out: `training_args.bin`, `rng_state*`, `scheduler.pt`.

    Args:
        directory: a checkpoint directory.
        patterns: which files count.

    Returns:
        File name → SHA-256 in hexadecimal, sorted by name.

    Raises:
        CheckpointError: there is no such directory, or a file cannot be read.
    """
    directory = Path(directory)
    _require_directory(directory)
    candidates = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    names = sorted(path.relative_to(directory).as_posix() for path in candidates if path.is_file())
    digests = {}
    for name in names:
        if any(fnmatch(name, pattern) for pattern in patterns):
            try:
                digests[name] = file_digest(directory / name)
            except OSError as error:
                fact = f"{directory / name} cannot be read: {one_line(error)}"
                raise CheckpointError(fact, way_out=SAVE_AGAIN) from error
    return digests


def checkpoint_digest(directory: Path) -> str:
    """One digest of all files that a result depends on, wherever the directory lies.

    Args:
        directory: a checkpoint directory.

    Returns:
        The SHA-256 of the canonical JSON of `file_digests`.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(file_digests(directory))


def weights_digest(directory: Path) -> str:
    """One digest of the files that determine the policy: not `optimizer.pt`, which is not read, nor the trainer's step.

    Args:
        directory: a checkpoint directory.

    Returns:
        The SHA-256 of the canonical JSON of the digests of these files.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(file_digests(directory, POLICY_FILES))


def tokenizer_digest(directory: Path) -> str:
    """One digest of the files that the tokenizer is made of: the checkpoints of a run have the same.

    Args:
        directory: a checkpoint directory.

    Returns:
        The SHA-256 of the canonical JSON of the digests of these files.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(file_digests(directory, TOKENIZER_FILES))


def _sha256(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- what must be there ----------------------------------------------------------------------------------------------


def require_layout(directory: Path) -> None:
    """Refuse a directory that lacks a file of a full fine-tuning checkpoint, and say what it is instead.

    Args:
        directory: a checkpoint directory.

    Raises:
        CheckpointError: there is no such directory, or a file is missing.
    """
    _require_directory(directory)
    has = {path.name for path in directory.iterdir()}
    if "adapter_config.json" in has:
        raise CheckpointError(
            f"{directory} holds an adapter (adapter_config.json), and adapters are not read yet",
            way_out="probe a checkpoint of full fine-tuning",
        )
    if "config.json" not in has:
        inside = sorted(name for name in has if name.startswith("checkpoint-"))
        raise CheckpointError(
            f"{directory} has no config.json",
            cause=f"it is a run directory, with {some_names(inside)} in it" if inside else "",
            way_out=f"give {directory}/checkpoint-*" if inside else "give a directory that a trainer saved",
        )
    shards = re.compile(r"global_step\d+$|pytorch_model_fsdp|optimizer_\d+$|optimizer\.bin$")
    sharded = sorted(filter(shards.match, has))
    saved_by = f"saved by DeepSpeed or FSDP as {some_names(sharded)}" if sharded else ""
    convert = "convert it to model.safetensors and optimizer.pt, or train without sharding" if sharded else ""
    if not has & {"model.safetensors", "model.safetensors.index.json"}:
        pickled = sorted(name for name in has if name.startswith("pytorch_model") and ".bin" in name)
        raise CheckpointError(
            f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json",
            cause=saved_by,
            way_out=f"convert {pickled[0]} to safetensors" if pickled else convert or SAVE_AGAIN,
        )
    if "optimizer.pt" not in has:
        raise CheckpointError(
            f"{directory} has no optimizer.pt",
            cause=saved_by or "save_only_model=True",
            way_out=convert or "save checkpoints with save_only_model=False",
        )
    if "trainer_state.json" not in has:
        fact = f"{directory} has no trainer_state.json"
        raise CheckpointError(fact, cause="the save was interrupted", way_out=SAVE_AGAIN)


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            f"There is no directory {directory} (working directory {os.getcwd()})",
            way_out="give the path of a checkpoint directory, usually RUN/checkpoint-STEP",
        )


# --- what they say ---------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {one_line(error)}", way_out=SAVE_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object", way_out=SAVE_AGAIN)
    return content


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors, from the headers of the safetensors files; no weight is read.

    Args:
        directory: a checkpoint directory.

    Returns:
        Name → shape.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is not in the shard that the index names.
    """
    from safetensors import SafetensorError, safe_open

    expected: dict[str, str] = {}
    shards = ["model.safetensors"]
    if not (directory / shards[0]).exists():  # transformers prefers the single file, too
        expected = read_json(directory / "model.safetensors.index.json").get("weight_map") or {}
        shards = sorted(set(expected.values()))
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, str] = {}
    for shard in shards:
        try:
            with safe_open(directory / shard, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    shapes[name], where[name] = tuple(file.get_slice(name).get_shape()), shard
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{directory / shard} cannot be opened as safetensors: {one_line(error)}",
                cause="the save or the copy was interrupted",
                way_out=SAVE_AGAIN,
            ) from error
    if lost := [name for name, shard in expected.items() if where.get(name) != shard]:
        raise CheckpointError(
            f"{directory}: tensors are not in the shard that model.safetensors.index.json names: {some_names(lost)}",
            cause="shards of two saves are mixed",
            way_out=SAVE_AGAIN,
        )
    return shapes
