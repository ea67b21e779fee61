"""Files from outside the store that a result depends on: known by their digest, and still what they were.

They are looked at before a stage runs and again when it has run, before anything of it is kept. What was replaced and
put back in between has the same content and another identity, and is found out as well.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from entropy_core.errors import CheckpointError, ConfigError, ProbeError
from entropy_core.files.checkpoint import (
    checkpoint_digest,
    description_digest,
    optimizer_digest,
    tokenizer_digest,
    weights_digest,
)
from entropy_core.files.digests import Identity, file_digest, with_identities, without_ctime

Stamps = dict[Path, tuple[frozenset[Identity], ...]]
"""Which files were found at each path, for each digest that it is known by."""


class Sources(dict[str, Path]):
    """Digest → the file or folder that has it, as they were when a sweep began."""

    def __missing__(self, digest: str) -> Path:
        raise ConfigError(
            f"a file of digest {digest[:12]} is none of those that the sweep began with",
            cause="a prompt, reward or loss file changed after the sweep had begun",
            fix="run the sweep again: what does not depend on it is reused",
        )


_DATA = {".parquet", ".arrow", ".json", ".jsonl", ".csv", ".gz"}


def content_digest(path: Path) -> str:
    """Content digest of a file; of a folder, that of the data files in it by their names, wherever the folder lies.

    Args:
        path: of the file or the folder.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in _DATA)
    if not any(file.suffix == ".arrow" for file in files):  # the card says which of them belong to which split
        files += [file for file in (path / "README.md",) if file.is_file()]
    digests = {file.relative_to(path).as_posix(): file_digest(file) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


DIGESTS = (tokenizer_digest, description_digest, weights_digest, optimizer_digest, checkpoint_digest, content_digest)
"""What a file or a folder can be known by, the cheapest first."""
_MADE_BY: dict[str, Callable[[Path], str]] = {}
"""Digest → the one of these that it is: every stage asks again."""


def stamps(inputs: Any, paths: Mapping[str, Path]) -> Stamps:
    """Make sure that the files that a stage's inputs name by digest hold what they are known by.

    Args:
        inputs: of the stage, as JSON values or pydantic models.
        paths: digest → the file or folder that has it.

    Returns:
        Which files these are.

    Raises:
        CheckpointError, ConfigError: one of them is gone, or holds something else.
    """
    found: Stamps = {}
    for digest in sorted(set(_strings(inputs)) & paths.keys()):
        found[paths[digest]] = (*found.get(paths[digest], ()), _identities(digest, paths[digest]))
    return found


def require_untouched(before: Stamps, after: Stamps, stage: str) -> None:
    """Refuse what a stage made of files that were written while it ran, be their content the same again.

    Args:
        before: of `stamps`, before it ran.
        after: when it had run.
        stage: its name.

    Raises:
        CheckpointError, ConfigError: a file is another one; names its path.
    """
    for path, identities in before.items():
        if after[path] != identities:
            raise _changed(path, f"while {stage} read them, so nothing of it is kept")


def require_unwritten(directory: Path, known: tuple[str, frozenset[Identity]]) -> None:
    """Refuse a checkpoint that was written while it was checked: what was read of it may not be what its digest is of.

    The ctime does not count: where a checkpoint is held by links, it is set when the trainer deletes its own name of a
    file.

    Args:
        directory: of the checkpoint.
        known: `with_identities` of its `checkpoint_digest`, before anything of it was read.

    Raises:
        CheckpointError: a file is another one, or gone.
    """
    before, now = known, with_identities(checkpoint_digest, directory)
    if before[0] != now[0] or without_ctime(before[1]) != without_ctime(now[1]):
        raise _changed(directory, "while it was checked")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, BaseModel):
        yield from _strings(value.model_dump())
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _identities(digest: str, path: Path) -> frozenset[Identity]:
    for digest_of in sorted(DIGESTS, key=lambda one: one is not _MADE_BY.get(digest)):
        with suppress(FileNotFoundError, NotADirectoryError, CheckpointError):
            found, identities = with_identities(digest_of, path)
            if found == digest:
                _MADE_BY[digest] = digest_of
                return identities
    raise _changed(path, "after the sweep had begun")


def _changed(path: Path, when: str) -> ProbeError:
    if path.is_dir():
        return CheckpointError(
            f"the files of {path} changed {when}",
            cause="the trainer is still writing, or rotates its checkpoints",
            fix="run the sweep again when the checkpoint is complete",
        )
    return ConfigError(
        f"{path} changed {when}",
        cause="it was edited or deleted meanwhile",
        fix="run the sweep again: what does not depend on it is reused",
    )
