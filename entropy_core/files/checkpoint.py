"""The files of a checkpoint directory: which ones count, and digests of what they contain.

    find_checkpoints     glob patterns and run directories → checkpoints, by step
    checkpoint_digest    one digest of every file that a result depends on
    optimizer_digest     one digest of the optimizer's state, be it a file or a folder of shards
    weights_digest       one digest of the files that the policy depends on
    description_digest   the same without the weights, where these are in shards
    tokenizer_digest     one digest of the files that the tokenizer is made of

Which files make a checkpoint is said in `checkpoints.layout`. No result depends on `training_args.bin`: what it says of
the settings is in the keys of what was made with them.
"""

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from functools import cache
from pathlib import Path

from entropy_core.errors import CheckpointError, one_line, shortage
from entropy_core.files.checkpoint_files import (
    ALWAYS,
    BYSTANDERS,
    SHARDS,
    STATE_FILES,
    STATE_FOLDERS,
    TRAINER_FILES,
    UNIVERSAL,
    WEIGHT_FILES,
)
from entropy_core.files.digests import file_digest

RUN_HINT = "entropy-probe.yaml"
"""In a run directory: what checkpoints do not record, such as the prompts and the reward, as a configuration has it."""

SAVE_AGAIN = "save the checkpoint again, or probe another one"

_INSIDE = {"actor", "policy", "trainer", "model"}
"""Folders of a checkpoint whose number is in the name of the folder above."""

# --- finding ---------------------------------------------------------------------------------------------------------


def find_checkpoints(patterns: Sequence[str]) -> list[Path]:
    """The directories that the patterns match, each once; a run directory stands for the checkpoints in it.

    Args:
        patterns: directories or glob patterns (`**` included), absolute or relative to the working directory.

    Returns:
        The directories, by the trailing integer of their name (100 after 20; names without one last), then by path. Of
        `global_step_100/actor` the folder above has the name.

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
                fix="correct the pattern; a run's checkpoints are usually RUN/checkpoint-*",
            )
        for match in sorted(matches):
            for directory in checkpoints_of_run(Path(match)) or [Path(match)]:
                found.setdefault(directory.resolve(), directory)

    def by_step(path: Path) -> tuple[float, str]:
        step = step_in_name(path)
        return (math.inf if step is None else step), str(path)

    return sorted(found.values(), key=by_step)


def checkpoints_of_run(directory: Path) -> list[Path]:
    """The checkpoints in a run directory; none in any other. A trainer saves its last model beside them, too.

    Of the Trainer and accelerate `checkpoint-N`, of verl and SkyRL `global_step_N`, of NeMo-RL and prime-rl `step_N`,
    of torchtitan `step-N`. A DeepSpeed `global_stepN` is a part of one checkpoint.
    """
    if any((directory / name).exists() for name in TRAINER_FILES):
        return []
    inside = [
        path for path in directory.iterdir() if re.fullmatch(r"(checkpoint[-_]|global_step_|step[-_])\d+", path.name)
    ]
    return sorted(path for path in inside if path.is_dir())


def checkpoint_name(directory: Path) -> str:
    """What to call a checkpoint: the name of its folder, or of the one above where that one has the number."""
    path = directory.resolve()
    return path.parent.name if path.name in _INSIDE and re.search(r"\d$", path.parent.name) else path.name


def step_in_name(directory: Path) -> int | None:
    """The number that the name of a checkpoint ends in; None where it ends in none."""
    digits = re.search(r"\d+$", checkpoint_name(directory))
    return int(digits[0]) if digits else None


def require_directory(directory: Path) -> None:
    """Refuse a path that is no directory."""
    if not directory.is_dir():
        raise CheckpointError(
            f"There is no directory {directory} (working directory {os.getcwd()})",
            fix="give the path of a checkpoint directory, usually RUN/checkpoint-STEP",
        )


def names_in(directory: Path) -> set[str]:
    """Names of the files and folders in a directory. Raises CheckpointError if one of them is neither.

    Nobody who reads it, a library above all, may be left waiting for a pipe, or reading a device without end.
    """
    found = list(directory.iterdir())
    for path in found:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a pipe or a device, and not a file", fix="remove it, or probe a copy")
    return {path.name for path in found}


def model_directory(directory: Path) -> Path:
    """Where the weights of a checkpoint lie: in the directory itself, in its `model/`, or in that of its named adapter.

    PEFT saves an adapter whose name is not `default` in a folder of this name; `ref` is TRL's reference policy. verl
    saves its adapter in `lora_adapter/`, beside the shards.
    """
    has = names_in(directory)
    if has & {"config.json", "adapter_config.json"}:
        return directory
    if (directory / "model").is_dir():
        return directory / "model"
    beside = {f"{folder}/lora_adapter" for folder in has & {"actor", "policy"}}
    named = [name for name in has.union(beside) - {"ref"} if (directory / name / "adapter_config.json").exists()]
    return directory / named[0] if len(named) == 1 else directory


# --- digests ---------------------------------------------------------------------------------------------------------


@cache
def _one_of(patterns: tuple[str, ...]) -> Callable[[str], object]:
    """A function that tells names that match one of these patterns; made once, since every stage asks."""
    return re.compile("|".join(map(translate, patterns)) or "(?!)").match


def file_digests(directory: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Content digests of the files that a result may depend on: all but the known bystanders.

    Args:
        directory: a checkpoint directory.
        besides: patterns of further files that do not count.

    Returns:
        File name → SHA-256 in hexadecimal, sorted by name.

    Raises:
        CheckpointError: there is no such directory, or a file cannot be read.
    """
    directory = Path(directory)
    require_directory(directory)
    candidates = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    names = sorted(path.relative_to(directory).as_posix() for path in candidates if path.is_file())
    counts, bystander, beside = map(_one_of, (ALWAYS, BYSTANDERS, besides))
    digests = {}
    for name in names:
        if not (beside(name) if counts(name) else beside(name) or bystander(name)):
            try:
                digests[name] = file_digest(directory / name)
            except OSError as error:
                fact = f"{directory / name} cannot be read: {one_line(error)}"
                raise shortage(error) or CheckpointError(fact, fix=SAVE_AGAIN) from error
    return digests


def checkpoint_digest(directory: Path) -> str:
    """One digest of all files that a result depends on, wherever the directory lies; a base model counts by itself.

    Args:
        directory: a checkpoint directory.

    Returns:
        The SHA-256 of the canonical JSON of `file_digests`, those of `model/` included where the model lies there.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    directory = Path(directory)
    digests = file_digests(directory) | _state_digests(directory)
    model = model_directory(directory)
    if model != directory:
        digests |= {f"model/{name}": digest for name, digest in file_digests(model, TRAINER_FILES).items()}
    return _sha256(digests)


def optimizer_digest(path: Path) -> str:
    """One digest of the optimizer's state.

    Args:
        path: `optimizer.pt`, or what a trainer has in its place: a file, or a folder with shards.

    Returns:
        The SHA-256 of the file; or of the canonical JSON of the digests of the shards.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return file_digest(path)
    shards = {
        file
        for folder in ("", *UNIVERSAL)
        for pattern in SHARDS
        for file in path.glob(f"{folder}/{pattern}".strip("/"))
    }
    return _sha256({file.relative_to(path).as_posix(): file_digest(file) for file in sorted(shards) if file.is_file()})


def _state_digests(directory: Path) -> dict[str, str]:
    """Of the files of a trainer that shards or gathers; none where there is an `optimizer.pt`."""
    if (directory / "optimizer.pt").exists():
        return {}
    found = {
        file
        for folder in STATE_FOLDERS
        for place in (directory.glob(folder) if folder else [directory])
        for pattern in STATE_FILES
        for file in place.glob(pattern)
        if file.is_file()
    }
    try:
        return {file.relative_to(directory).as_posix(): file_digest(file) for file in sorted(found)}
    except OSError as error:
        fact = f"a file of {directory} cannot be read: {one_line(error)}"
        raise shortage(error) or CheckpointError(fact, fix=SAVE_AGAIN) from error


def description_digest(directory: Path) -> str:
    """One digest of the files that a model without its weights is made of: its configuration and its tokenizer.

    Args:
        directory: of a model.

    Returns:
        The SHA-256 of the canonical JSON of the digests of these files.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(description_files(directory))


def description_files(directory: Path) -> dict[str, str]:
    """The files of `description_digest`, each with its own. Raises CheckpointError as `file_digests` does."""
    return file_digests(directory, (*TRAINER_FILES, *SHARDS, "*.safetensors", "*.safetensors.index.json"))


def weights_digest(directory: Path) -> str:
    """One digest of the files that may determine the policy: not `optimizer.pt`, which is not read, nor the step.

    Args:
        directory: of a model or of an adapter.

    Returns:
        The SHA-256 of the canonical JSON of the digests of these files.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(file_digests(directory, TRAINER_FILES))


def tokenizer_digest(directory: Path) -> str:
    """One digest of the files that the tokenizer may be made of: the checkpoints of a run have the same.

    Args:
        directory: a checkpoint directory.

    Returns:
        The SHA-256 of the canonical JSON of the digests of these files.

    Raises:
        CheckpointError: as `file_digests` does.
    """
    return _sha256(file_digests(directory, (*TRAINER_FILES, *WEIGHT_FILES, *SHARDS)))


def _sha256(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
