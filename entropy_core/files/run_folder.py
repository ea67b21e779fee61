"""The folder `entropy-probe/` in a run directory: what a trainer and a probe that run side by side tell each other.

    RUN/entropy-probe.yaml                 what checkpoints do not record, see `files.checkpoint.RUN_HINT`
    RUN/entropy-probe/prompts.parquet      the prompts of the training                       written by the trainer
    RUN/entropy-probe/batches/NAME.parquet the batch of the last step before a checkpoint    written by the trainer
    RUN/entropy-probe/probed/NAME.json     the numbers of a checkpoint                       written by the probe
    RUN/entropy-probe/stop                 the trainer is to save and stop                   written by anybody

No trainer deletes this folder when it rotates its checkpoints, and no file of a checkpoint is touched.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = "entropy-probe"


def numbers_file(run: Path, checkpoint: str) -> Path:
    """Where the numbers of a checkpoint are told."""
    return run / FOLDER / "probed" / f"{checkpoint.replace('/', '-')}.json"


def stop_file(run: Path) -> Path:
    """The file that asks a trainer with a `ProbeCallback` to save and stop."""
    return run / FOLDER / "stop"


def tell_numbers(run: Path, numbers: Mapping[str, Any]) -> None:
    """Tell a trainer what was found of one of its checkpoints; whoever reads it meanwhile sees all or nothing of it.

    Args:
        run: the run directory.
        numbers: JSON values; `checkpoint` is its name.

    Raises:
        OSError: nothing can be written there, or there is no such run any more.
    """
    os.stat(run)
    write_whole(numbers_file(run, str(numbers["checkpoint"])), json.dumps(numbers, indent=1).encode())


def numbers_told(run: Path, besides: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was told since the last time: file name and numbers. Costs one listing of a folder where there is nothing.

    Args:
        run: the run directory.
        besides: file names that are known already.
    """
    try:
        names = os.listdir(run / FOLDER / "probed")
    except OSError:  # nobody has told anything yet
        return
    for name in sorted(name for name in set(names) - besides if name.endswith(".json") and not name.startswith(".")):
        try:
            numbers = json.loads((run / FOLDER / "probed" / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(numbers, dict):
            yield name, numbers


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
