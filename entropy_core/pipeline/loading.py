"""Load what a sweep begins with: the prompts of a split, the state of an optimizer."""

from pathlib import Path

from entropy_core.config.schema import ProbeConfig
from entropy_core.files.sources import content_digest
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.prompts_and_rewards import encoding
from entropy_core.pipeline.runner import Runner
from entropy_core.prompts import pools as prompts
from entropy_core.store.artifact import Artifact


def source_of(config: ProbeConfig) -> Path | None:
    """Return the file or folder of the prompts; None for a generated pool."""
    batch = config.batch_config
    return prompts.locate(batch.dataset_name, batch.dataset_path, batch.allow_download)


def load_pool(config: ProbeConfig, split: str, tokenizer: str, run: Runner) -> Artifact:
    """Load the prompts of a split.

    Args:
        config: configuration with the dataset.
        split: name of the split.
        tokenizer: digest of the tokenizer's files.
        run: runner of stages.

    Returns:
        Artifact of load-prompts.
    """
    batch, source = config.batch_config, source_of(config)
    inputs = {
        "dataset_name": "" if prompts.is_path(batch.dataset_name) else batch.dataset_name,
        "options": batch.dataset_options,
        "configuration": batch.dataset_config,
        "split": split,
        "prompt_column": batch.prompt_column,
        "source": content_digest(source) if source else "",  # keyed by content, not by path
        "revision": prompts.revision(source) if source else "",
        "library": prompts.library(batch.dataset_name),
        "tokenizer": tokenizer,
        "encoding": encoding(config),
    }
    return run(stage.LOAD_PROMPTS, inputs, f"{Path(batch.dataset_name).name} {split}")


def load_checkpoint(config: ProbeConfig, checkpoint: CheckpointToProbe, run: Runner) -> Artifact:
    """Load and check the optimizer state of a checkpoint.

    Args:
        config: configuration, which may set another learning rate or a fresh optimizer.
        checkpoint: a checkpoint from `preflight`.
        run: runner of stages.

    Returns:
        Artifact of load-checkpoint.
    """
    inputs = {
        "checkpoint": checkpoint.digest,
        "base": checkpoint.base or checkpoint.description,
        "learning_rate": config.update.learning_rate,
        "optimizer_state": config.update.optimizer_state,
        "weights": config.policy.weights,
    }
    return run(stage.LOAD_CHECKPOINT, inputs, checkpoint.name)
