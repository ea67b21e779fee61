"""Whether a trainer has finished writing a checkpoint, as far as its files tell while the trainer runs.

    of `transformers.Trainer` and TRL    trainer_state.json is written last, and TRL's adaptive entropy bonus after it
    of any other trainer                 an optimizer's state is there, and nothing was written for a while

A checkpoint may be saved a second time into the same directory, after a restart: then its old trainer_state.json says
nothing, and what is younger than it is still being written. And it may be deleted, file by file: a directory that is
younger than all of its files has lost one.
"""

import time
from pathlib import Path

from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.training_args import ENTROPY_CONTROL, TRAINING_ARGUMENTS, read_training_arguments
from entropy_core.errors import CheckpointError

QUIET = 30.0
"""Seconds without a write after which a checkpoint of a trainer that marks no end is taken to be complete."""

_STATE = "trainer_state.json"
_LARGE = (".safetensors", ".pt", ".bin", ".distcp")  # suffixes of weights and of optimizers


def what_is_missing(directory: Path) -> str:
    """Say what a checkpoint still lacks.

    Args:
        directory: of a checkpoint that a trainer may be writing, or deleting.

    Returns:
        A clause without a full stop, or "" for a complete checkpoint. Whether it can be probed is another question.
    """
    try:
        return _missing(directory)
    except FileNotFoundError:
        return "its files are being deleted"


def training_is_over(directory: Path) -> bool:
    """Whether a complete checkpoint is the last one of its training, as its trainer_state.json says."""
    try:
        state = read_json(directory / _STATE)
    except CheckpointError:
        return False
    made, asked = state.get("global_step"), state.get("max_steps")
    return isinstance(made, int) and isinstance(asked, int) and 0 < asked <= made


def _missing(directory: Path) -> str:
    written = {path: path.stat().st_mtime for path in directory.rglob("*") if path.is_file()}
    youngest = max(written.values(), default=0.0)
    changed = max(path.stat().st_mtime for path in [directory, *directory.rglob("*")])  # folders included
    quiet_for = time.time() - changed
    state = directory / _STATE
    if state in written:
        try:
            read_json(state)
        except CheckpointError:
            return f"{_STATE} is half-written"
        younger = [path.name for path, at in written.items() if path.suffix in _LARGE and at > written[state]]
        if younger and quiet_for < QUIET:
            return f"{younger[0]} is younger than {_STATE}: it is being saved again"
        if changed > youngest and quiet_for < QUIET:
            return "a file of it was deleted a moment ago"
        return _missing_after_the_state(directory, written)
    if directory / TRAINING_ARGUMENTS in written:
        return f"there is no {_STATE}, which its trainer writes last"
    if quiet_for < QUIET:
        return f"it was written to {quiet_for:.0f} s ago"
    from entropy_core.checkpoints.layouts.places import find_places  # loads torch: not while a trainer saves

    try:
        return "" if find_places(directory) else "there is no optimizer's state"
    except CheckpointError:  # a layout that is known and not read: the refusal says so
        return ""


def _missing_after_the_state(directory: Path, written: dict[Path, float]) -> str:
    """TRL writes where its adaptive entropy bonus is when everything else is there."""
    if directory / TRAINING_ARGUMENTS not in written:
        return ""
    try:
        _, arguments = read_training_arguments(directory / TRAINING_ARGUMENTS)
    except CheckpointError:
        return ""
    control = written.get(directory / ENTROPY_CONTROL, 0.0)
    late = arguments.get("use_adaptive_entropy") is True and control < written[directory / _STATE]
    return f"there is no {ENTROPY_CONTROL} yet" if late else ""
