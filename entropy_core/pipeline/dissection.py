"""The checkpoint that comes one step after another, for the post-mortem of that step."""

import re
from pathlib import Path

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import Layout, find_layout
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import weights_digest
from entropy_core.pipeline.reference import require_whole


def next_checkpoint(directory: Path, step: int) -> Path | None:
    """Find the directory of the checkpoint of the next step by its name.

    Args:
        directory: of a checkpoint; its last part, or the one before, ends with the number of the step.
        step: of the checkpoint.

    Returns:
        The directory; None where there is none.
    """
    for depth in range(min(2, len(directory.parts))):
        place = directory.parents[depth]
        name, inside = directory.relative_to(place).parts[0], directory.relative_to(place).parts[1:]
        if (number := re.search(r"\d+$", name)) and int(number[0]) == step:
            later = name[: number.start()] + str(step + 1).zfill(len(number[0]) if number[0].startswith("0") else 0)
            found = place.joinpath(later, *inside)
            return found if found.is_dir() else None
    return None


def weights_after(config: ProbeConfig, layout: Layout, step: int) -> tuple[str, Path] | None:
    """Digest and directory of the weights after the next step.

    Args:
        config: configuration of the sweep.
        layout: of a checkpoint.
        step: of the checkpoint.

    Returns:
        None where no post-mortem is asked for, or there is no such checkpoint.

    Raises:
        CheckpointError: the next checkpoint cannot be compared with this one.
    """
    if not config.post_mortem:
        return None
    directory = next_checkpoint(layout.directory.resolve(), step)
    if directory is None:
        return None
    after = find_layout(directory, config.policy.base_model, fresh=True)
    whole = "convert its weights to model.safetensors, or set post_mortem: false"
    require_whole(after, "the next checkpoint", whole)
    theirs, ours = (read_architecture(one)[0].trained for one in (after, layout))
    if theirs != ours:
        raise CheckpointError(
            f"{directory} has other trained parameters than {layout.directory}",
            cause="they are of two runs",
            fix="probe checkpoints of one run, or set post_mortem: false",
        )
    return weights_digest(after.model), after.model
