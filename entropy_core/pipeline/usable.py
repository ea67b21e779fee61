"""Find the checkpoints of a configuration that can be probed, as far as can be told without their weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from entropy_core.checkpoints.checkpoint import Checkpoint, read_checkpoint
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.tokenizer import tokenizer_directory
from entropy_core.checkpoints.trainer_files import TrainerFiles, read_trainer_files
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError, one_line
from entropy_core.files.checkpoint import (
    checkpoint_digest,
    description_digest,
    find_checkpoints,
    tokenizer_digest,
    weights_digest,
)
from entropy_core.files.digests import Identity, with_identities
from entropy_core.pipeline.patterns import require_quick_patterns
from entropy_core.pipeline.settings import Settled, settle, with_read

_Found = TypeVar("_Found")


class UsableCheckpoint(NamedTuple):
    """A checkpoint whose files are sound.

    Attributes:
        name: name of the directory, unique in the sweep.
        checkpoint: its step, shapes and optimizer.
        trainer: what its files say about the trainer.
        digest: digest of all files that a result depends on, from before anything else of them was read.
        files: which files these were.
        weights: digest of the files that the policy depends on; empty where the weights are in shards.
        description: digest of the model's configuration and tokenizer, where the weights are in shards; else empty.
        base: of those of the base model under an adapter; empty for a full model.
        home: directory of the tokenizer.
        tokenizer: digest of the files that it is made of.
    """

    name: str
    checkpoint: Checkpoint
    trainer: TrainerFiles
    digest: str
    files: frozenset[Identity]
    weights: str
    description: str
    base: str
    home: Path
    tokenizer: str


def usable_checkpoints(config: ProbeConfig) -> tuple[list[UsableCheckpoint], list[str]]:
    """Return the checkpoints that can be probed, by step, and a sentence about each one that is left out.

    Args:
        config: what is asked for.

    Raises:
        CheckpointError: a pattern matches nothing; or a checkpoint cannot be probed, and it is the only one, none can,
            or the configuration says to refuse it.
    """

    def read(directory: Path, name: str) -> UsableCheckpoint:
        digest, files = with_identities(checkpoint_digest, directory)
        checkpoint = _checkpoint(config, directory)
        layout = checkpoint.layout
        home = tokenizer_directory(layout.model, layout.base)
        return UsableCheckpoint(
            name=name,
            checkpoint=checkpoint,
            trainer=read_trainer_files(layout),
            digest=digest,
            files=files,
            weights="" if layout.shards else weights_digest(layout.model),
            description=description_digest(layout.model) if layout.shards else "",
            base=weights_digest(layout.base) if layout.base else "",
            home=home,
            tokenizer=tokenizer_digest(home),
        )

    return _each(config, read)


def read_settings(config: ProbeConfig) -> tuple[ProbeConfig, Settled, dict[str, TrainerFiles]]:
    """Return the settings of a sweep, without its prompts and its reward. Reads no large file.

    Args:
        config: what is asked for.

    Returns:
        The configuration, completed from the checkpoints; where each setting comes from; and the trainer files of each
        checkpoint that can be probed, by name.

    Raises:
        ProbeError: as `usable_checkpoints` and `settle`.
    """

    def trainer(directory: Path, name: str) -> tuple[str, TrainerFiles]:
        return name, read_trainer_files(_checkpoint(config, directory).layout)

    trainers = dict(_each(config, trainer)[0])
    settled = settle(config, trainers)
    return with_read(config, settled.read), settled, trainers


def _each(config: ProbeConfig, read: Callable[[Path, str], _Found]) -> tuple[list[_Found], list[str]]:
    directories = find_checkpoints(config.checkpoints)
    strict = config.execution.unusable_checkpoints == "refuse" or len(directories) == 1
    found: list[_Found] = []
    left_out: list[str] = []
    first: CheckpointError | None = None
    for directory, name in zip(directories, _unique_names(directories), strict=True):
        try:
            found.append(read(directory, name))
        except (CheckpointError, FileNotFoundError) as error:  # a file that goes meanwhile: its trainer rotates
            if not isinstance(error, CheckpointError):
                error = CheckpointError(one_line(error), cause="the trainer removed it", fix="probe another one")
            if strict:
                raise error from None
            first = first or error
            said = " ".join(str(error).replace(f"{directory}/", "").replace(str(directory), name).split())
            left_out.append(f"{name} is left out: {said}")
    if first is not None and not found:
        raise first
    return found, left_out


def _checkpoint(config: ProbeConfig, directory: Path) -> Checkpoint:
    fresh = config.update.optimizer_state == "fresh"
    masters = config.policy.weights == "master"
    require_quick_patterns(find_layout(directory, config.policy.base_model, fresh))
    return read_checkpoint(directory, config.update.learning_rate or None, config.policy.base_model, fresh, masters)


def _unique_names(directories: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parents as it takes to tell all of them apart."""
    paths = [directory.resolve().parts for directory in directories]
    length = 1
    while len({parts[-length:] for parts in paths}) < len(set(paths)):
        length += 1
    return ["/".join(parts[-length:]) for parts in paths]
