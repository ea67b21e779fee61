"""What can be refused before any expensive work starts is refused here."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from entropy_core import prompts, rewards
from entropy_core.checkpoint_files import checkpoint_digest, find_checkpoints, weights_digest
from entropy_core.checkpoints import read_checkpoint
from entropy_core.config import ProbeConfig
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.policy import load_tokenizer


@dataclass(frozen=True)
class CheckpointToProbe:
    """A checkpoint that can be probed.

    Args:
        directory: where it is.
        name: of the directory, unique in the sweep.
        step: of the trainer.
        digest: of all files that a result depends on.
        weights: of those that the policy depends on.
        assumptions: what the files do not say.
    """

    directory: Path
    name: str
    step: int
    digest: str
    weights: str
    assumptions: tuple[str, ...]


def preflight(config: ProbeConfig) -> list[CheckpointToProbe]:
    """Check everything that the configuration names; loads no weights and samples nothing.

    Args:
        config: what is asked for.

    Returns:
        The checkpoints, by step.

    Raises:
        ProbeError: something is missing, broken or too small; says what to do.
    """
    _check_batches(config)
    directories = find_checkpoints(config.checkpoints)
    names = [directory.resolve().name for directory in directories]
    found = []
    for directory, name in zip(directories, names, strict=True):
        checkpoint = read_checkpoint(directory, config.update.learning_rate or None)
        unique = name if names.count(name) == 1 else f"{directory.resolve().parent.name}/{name}"
        found.append(
            CheckpointToProbe(
                directory=directory.resolve(),
                name=unique,
                step=checkpoint.step,
                digest=checkpoint_digest(directory),
                weights=weights_digest(directory),
                assumptions=checkpoint.assumptions,
            )
        )
        _check_tokenizer(directory)
    return found


def splits(config: ProbeConfig) -> tuple[str, str]:
    """The splits that E and U draw from."""
    batch = config.batch_config
    return batch.E_split or batch.split, batch.U_split or batch.split


def _check_batches(config: ProbeConfig) -> None:
    batch = config.batch_config
    e_split, u_split = splits(config)
    e_pool, u_pool = (prompts.load_pool(batch.dataset_name, s, batch.prompt_column) for s in (e_split, u_split))
    _check_size("B_U", batch.B_U, u_pool, u_split)
    if batch.E_sampling_mode == "distinct":
        _check_size("B_E_values", batch.B_E_values[0], e_pool, e_split)
    # One call on an empty response: a reward that cannot be called at all is found before the sampling, not after.
    columns = {name: u_pool[name].slice(0, 1).to_pylist() for name in u_pool.column_names if name != "prompt"}
    rewards.compute_rewards(config.update.reward, [u_pool["prompt"][0].as_py()], [""], columns)


def _check_size(key: str, wanted: int, pool: pa.Table, split: str) -> None:
    if wanted > pool.num_rows:
        raise ConfigError(
            f"batch_config.{key} asks for {wanted} distinct prompts, but split {split!r} has {pool.num_rows}",
            way_out=f"set {key} to at most {pool.num_rows}, or use a larger pool",
        )


def _check_tokenizer(directory: Path) -> None:
    try:
        load_tokenizer(directory)
    except Exception as error:  # tokenizers of all kinds raise errors of all kinds
        raise CheckpointError(
            f"{directory} has no tokenizer that can be loaded ({type(error).__name__})",
            cause="the trainer was not given the tokenizer, and did not save it",
            way_out="save the tokenizer into the checkpoint directory",
        ) from error
