"""SHA-256 of files, each read once: what is known of an unchanged file is remembered.

A file is unchanged while its device, inode, size, mtime and ctime are. The mtime alone can be set back; the ctime is
the system's. A file whose ctime is younger than two seconds is not remembered: its clock may be too coarse to tell the
next change from the last.

Digests of large files outlive the process, in `digests.jsonl` in the user's cache folder, one line for each, see
`cache_folder`. Processes append to it and never wait for one another; a line that is not whole is no line.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from entropy_core.files.cache_folder import cache_folder, open_own, replace_own
from entropy_core.files.regular import require_readable

Identity = tuple[int, ...]
"""Of a file that has not changed: device, inode, size, mtime, ctime."""

LARGE = 4 * 2**20
"""Bytes from which on a digest outlives the process: reading less takes milliseconds."""
SETTLED_NS = 2_000_000_000
MOST_BYTES = 4 * 2**20
"""Of `digests.jsonl`; when it is longer, its older half goes."""

_lock = threading.Lock()
_known: dict[Identity, str] = {}
_seen: ContextVar[set[Identity] | None] = ContextVar("seen", default=None)


def identity_of(stat: os.stat_result) -> Identity:
    """What tells a file from every other one, and from itself after a change."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def without_ctime(identities: frozenset[Identity]) -> frozenset[Identity]:
    """The same but for the ctime, which is also set when another name of a file is made or deleted."""
    return frozenset(identity[:-1] for identity in identities)


def file_digest(path: Path) -> str:
    """Content digest of one file, read only if it is not known.

    Args:
        path: any file.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with require_readable(Path(path)).open("rb") as file:
        identity = identity_of(os.fstat(file.fileno()))
        if (seen := _seen.get()) is not None:
            seen.add(identity)
        if known := _recall(identity):
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if identity_of(os.fstat(file.fileno())) == identity and time.time_ns() - identity[-1] >= SETTLED_NS:
            _remember(identity, digest)
        return digest


def read_digest(path: Path) -> str:
    """Content digest of one file, read from the disk whatever is known of it. Raises OSError."""
    with require_readable(Path(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_identities(digest: Callable[[Path], str], path: Path) -> tuple[str, frozenset[Identity]]:
    """A digest that is made of file digests, and the identities of all these files.

    Args:
        digest: calls `file_digest`.
        path: its argument.

    Returns:
        What it returned, and which files they were. Content that was replaced and put back has other identities.
    """
    token = _seen.set(set())
    try:
        return digest(path), frozenset(_seen.get() or ())
    finally:
        _seen.reset(token)


def _recall(identity: Identity) -> str | None:
    with _lock:
        if identity not in _known and identity[2] >= LARGE:
            _known.update(_memory().read())
        return _known.get(identity)


def _remember(identity: Identity, digest: str) -> None:
    with _lock:
        _known[identity] = digest
        if identity[2] >= LARGE:
            _memory().append(identity, digest)


class _Memory:
    """`digests.jsonl`: what was read of it, and where the next line goes."""

    def __init__(self) -> None:
        self._file: tuple[str, int] | None = None  # path and inode of what was read
        self._read = 0  # bytes of it

    @staticmethod
    def path() -> Path:
        return cache_folder() / "digests.jsonl"

    def read(self) -> dict[Identity, str]:
        """What has been added since the last time."""
        found: dict[Identity, str] = {}
        try:
            with open_own(self.path(), os.O_RDONLY) as file:
                here = str(self.path()), os.fstat(file.fileno()).st_ino
                if here != self._file:
                    self._file, self._read = here, 0
                file.seek(self._read)
                for line in (file.read() or b"").splitlines(keepends=True):
                    if line.endswith(b"\n"):
                        self._read += len(line)
                        found.update(_entry(line))
        except (OSError, RuntimeError):  # no home
            pass
        return found

    def append(self, identity: Identity, digest: str) -> None:
        """Add a line; where that cannot be done, nothing."""
        try:
            path = self.path()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
                file.write(_line(identity, digest))
                if os.fstat(file.fileno()).st_size > MOST_BYTES:
                    file.seek(MOST_BYTES // 2)
                    replace_own(path, (file.read() or b"").partition(b"\n")[2])
        except (OSError, RuntimeError):
            pass


@cache
def _memory() -> _Memory:
    return _Memory()


def _line(identity: Identity, digest: str) -> bytes:
    text = json.dumps([*identity, digest])
    return f"{text[:-1]}, {_checksum(text)}]\n".encode()


def _entry(line: bytes) -> dict[Identity, str]:
    """A line, if it is as it was written."""
    try:
        *identity, digest, _ = json.loads(line)
        entry = {tuple(identity): digest}
        return entry if line == _line(tuple(identity), digest) else {}
    except (ValueError, TypeError):
        return {}


def _checksum(text: str) -> str:
    return json.dumps(hashlib.sha256(text.encode()).hexdigest()[:16])
