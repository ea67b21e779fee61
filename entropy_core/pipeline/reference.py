"""The reference policy of the KL term."""

from pathlib import Path

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import Layout, find_layout
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.files.checkpoint import weights_digest
from entropy_core.pipeline.patterns import require_quick_patterns


def require_whole(of: Layout, what: str, fix: str) -> None:
    """Refuse a model beside the one that is probed if it cannot be loaded as it lies there.

    Args:
        of: where it lies.
        what: it is, for people.
        fix: what to do where its weights are in shards.

    Raises:
        ConfigError: they are.
        CheckpointError: an adapter names its parameters by a pattern that may take for ever.
    """
    if of.shards is not None:
        fact = f"{what} {of.directory} has its weights in shards, which are read of what is probed alone"
        raise ConfigError(fact, fix=fix)
    require_quick_patterns(of)


def reference_of(config: ProbeConfig, layout: Layout, name: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Find the reference policy of the KL term: the configured one, else that of the trainer.

    TRL keeps the adapter that it began with in `ref/`; without one, the reference is the base without an adapter.

    Returns:
        Digest and directory of its weights, and then of its base if it is an adapter; and what to say of it.

    Raises:
        ConfigError: there is none.
        CheckpointError: it cannot be loaded, or has another vocabulary.
    """
    asked = config.update.reference
    if asked:
        of = find_layout(Path(asked), config.policy.base_model, fresh=True)
        about = f"The reference policy is {Path(asked).name}."
    elif layout.base is None:
        raise ConfigError(
            f"update.kl_beta is set, and {name} is no adapter, whose base would be the reference policy",
            fix="set update.reference to the directory that training started from",
        )
    elif (layout.model / "ref" / "adapter_config.json").exists():
        of, about = (
            find_layout(layout.model / "ref", layout.base, fresh=True),
            "The reference policy is that in `ref/`.",
        )
    else:
        of = find_layout(layout.base, fresh=True)
        about = "The reference policy is the base without its adapter."
    require_whole(of, "the reference policy", "set update.reference to a directory with model.safetensors")
    theirs, ours = (read_architecture(one)[0].vocabulary for one in (of, layout))
    if theirs != ours:
        raise CheckpointError(
            f"the reference policy {of.directory} has {theirs} tokens, and {name} has {ours}",
            cause="it is not what training started from, or tokens were added for the training",
            fix="correct update.reference; or say update.kl_beta: 0",
        )
    return {weights_digest(directory): directory for directory in (of.model, of.base) if directory}, (about,)
