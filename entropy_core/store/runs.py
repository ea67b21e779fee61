"""Recorded runs: root/runs/<run id>/ with the files that people open, and run.json, which says what made them.

Artifacts are named in run.json as {"artifact": {"stage", "key", "digest"}}. They and all that they were made from are
what a run needs; nothing else keeps an artifact. Where a key is set, run.json is signed with it, see `signature`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from entropy_core.errors import StoreError, one_line
from entropy_core.files.regular import NotAFileError, require_readable
from entropy_core.store.manifest import MOST_BYTES, TEMPORARY, bring_to_disk, may_name, temporary_sibling
from entropy_core.store.signature import SIGNATURE, require_signature, signature
from entropy_core.store.store import Store

RECORD = "run.json"
"""Written last: a folder without it is not a recorded run."""

Name = tuple[str, str]
"""Of an artifact: stage and key."""


def folder(root: Path, run_id: str) -> Path:
    """Where the files of a run are."""
    return root / "runs" / run_id


def recorded(root: Path) -> list[str]:
    """The ids of the recorded runs, in the order in which they finished."""
    found = []
    for run_id in present(root):
        with suppress(StoreError):
            found.append((finished(root, run_id), run_id))
    return [run_id for _, run_id in sorted(found)]


def finished(root: Path, run_id: str) -> datetime:
    """When a run finished.

    Raises:
        StoreError: its record cannot be understood, or is not signed as it must be.
    """
    with understood(folder(root, run_id) / RECORD) as record:
        _named(record), _rerun_of(record)
        return _finished(record)


def sweeps(root: Path) -> list[str]:
    """The ids of the recorded sweeps, in the order in which they finished: of the runs that are no reruns."""
    return [run_id for run_id in recorded(root) if not rerun_of(root, run_id)]


def rerun_of(root: Path, run_id: str) -> str:
    """The id of the run that a recorded run is a rerun of; empty for a sweep.

    Raises:
        StoreError: its record cannot be understood, or is not signed as it must be.
    """
    with understood(folder(root, run_id) / RECORD) as record:
        return _rerun_of(record)


def present(root: Path) -> list[str]:
    """The ids of the runs that have a record, whether or not it can be understood."""
    names = (path.parent.name for path in (root / "runs").glob(f"*/{RECORD}"))
    return sorted(name for name in names if not name.startswith(TEMPORARY))


@contextmanager
def understood(path: Path) -> Iterator[Any]:
    """Read a record; what goes wrong within the context is that it does not say what it should.

    Args:
        path: of a run.json.

    Yields:
        What is in it. Where no key is set, it may have been edited or come from anywhere.

    Raises:
        StoreError: it cannot be understood.
        SignatureError: it is not signed as it must be.
    """
    with _explained(path):
        record, said = _parted(path)
        require_signature(said, _seal(record), path.parent)
        yield record


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (NotAFileError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path} does not say what the run needs: {one_line(error)}",
            cause="it was edited, damaged, or written by another version",
            fix="run the sweep again, or delete the folder",
        ) from None


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, signed with the key that is set.

    Args:
        directory: from `writing`.
        record: JSON values.
    """
    text = json.dumps({**record, **signature(_seal(record))}, indent=1, sort_keys=True)
    (directory / RECORD).write_text(text, encoding="utf-8")


def sign(store: Store, run_id: str) -> str:
    """Sign the record of a run with the key that is set, whatever key it was signed with.

    Returns:
        What is wrong with it, in which case nothing was changed; or "".
    """
    path = folder(store.root, run_id) / RECORD
    try:
        with _explained(path):
            record, _ = _parted(path)
            _named(record), _finished(record), _rerun_of(record)
    except StoreError as error:
        return error.fact
    with writing(store, run_id) as temporary:
        write(temporary, record)
    return ""


def _parted(path: Path) -> tuple[Any, Any]:
    """A record, and its signature if it has one."""
    if (size := require_readable(path).stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    record = json.loads(path.read_text(encoding="utf-8"))
    return record, record.pop(SIGNATURE, None)


def _finished(record: Mapping[str, Any]) -> datetime:
    when = datetime.fromisoformat(record["finished"])
    if when.tzinfo is None:
        raise ValueError(f"finished: {when} has no time zone")
    return when


def _rerun_of(record: Mapping[str, Any]) -> str:
    named = record.get("rerun_of", "")
    if not isinstance(named, str):
        raise ValueError(f"rerun_of: {named!r:.80} is no id of a run")
    return named


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def find(root: Path, run_id: str) -> Path:
    """The folder of a recorded run.

    Args:
        root: of the store.
        run_id: of the run; `latest` is the sweep that finished last. A rerun of a sweep has to be named.

    Raises:
        StoreError: there is none, or its record cannot be used.
    """
    known = recorded(root)
    if run_id == "latest" and (of_sweeps := sweeps(root)):
        return folder(root, of_sweeps[-1])
    if run_id in known:
        return folder(root, run_id)
    for unusable in present(root):
        if run_id in (unusable, "latest"):
            finished(root, unusable)  # raises the reason
    what = "only reruns are recorded:" if run_id == "latest" else "recorded are"
    listed = f"{what} {', '.join(known)}" if known else "no sweep is recorded there"
    raise StoreError(
        f"there is no run {run_id!r} in {root / 'runs'}; {listed}",
        fix="give one of these ids, or run `entropy-probe sweep` first",
    )


@contextmanager
def writing(store: Store, run_id: str) -> Iterator[Path]:
    """A folder to write the files of a run into; they take their places at the end, each in one step.

    Args:
        store: where the run is recorded.
        run_id: of the run; the files of an earlier run of this id are replaced.

    Yields:
        A temporary folder.

    Raises:
        StoreError: the store cannot be written; the record is what it was.
    """
    final = folder(store.root, run_id)
    if final.is_symlink():
        raise StoreError(f"{final} is a link to another folder, which is not written to", fix="remove the link")
    with store.writing():
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(final) as temporary:
            yield temporary
            final.mkdir(exist_ok=True)
            bring_to_disk(temporary.iterdir())
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == RECORD):
                path.replace(final / path.name)


def references(value: Any) -> Iterator[Mapping[str, str]]:
    """The artifacts that a record names, at any depth; see `Artifact.to_dict`."""
    if isinstance(value, Mapping) and set(value) == {"artifact"}:
        yield value["artifact"]
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from references(item)


def named(root: Path, run_id: str) -> set[Name]:
    """What the record of a run names: the inputs of its variance stage, and its report.

    Raises:
        StoreError: the record cannot be understood.
    """
    with understood(folder(root, run_id) / RECORD) as record:
        return _named(record)


def _named(record: Mapping[str, Any]) -> set[Name]:
    if wrong := [entry for entry in record["checkpoints"] if not isinstance(entry["checkpoint"], str)]:
        raise ValueError(f"{wrong[0]['checkpoint']!r:.80} names no checkpoint")
    found = [*references(record["checkpoints"]), record["report"]]
    names = {(reference["stage"], reference["key"]) for reference in found}
    if unknown := [name for name in names if not may_name(*name)]:
        raise ValueError(f"{unknown[0]} names no artifact")
    return names


def with_upstream(store: Store, names: set[Name]) -> set[Name]:
    """Artifacts, and all that they were made from as far as it is there and its manifests can be read."""
    found: set[Name] = set()
    ahead = set(names)
    while ahead:
        name = ahead.pop()
        found.add(name)
        manifest = store.manifest(*name)
        ahead |= {(one["stage"], one["key"]) for one in manifest.get("upstream", ())} - found
    return found
