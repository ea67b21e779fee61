"""Who works on a store: locks between processes, which the system frees when their holder dies.

    root/.locks/<stage>-<key>.lock    held while an artifact is computed or set aside
    root/.locks/in-use                shared by all that rely on what is there, held alone by what deletes
    root/.locks/users/                a file for each of the former, since a lock may not be seen from other machines

Who holds a lock is written into its file, so that who waits can say for whom.
"""

import fcntl
import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropy_core.errors import StoreError

log = logging.getLogger("entropy_probe.store")

_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BETWEEN_LINES = 600.0
_MOST_SECONDS = 86_400.0


class HeldError(StoreError):
    """Another process or thread holds the lock."""


@contextmanager
def key_lock(folder: Path, stage_name: str, key: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock of one key. While another holds it, say who, and since when; and again now and then.

    Args:
        folder: of the locks.
        stage_name: name of the stage.
        key: its key.
        wait: until it is free, for a day at most.

    Raises:
        HeldError: it is not free, and waiting was not asked for, or took too long.
        StoreError: the file system has no locks.
        OSError: the folder cannot be written.
    """
    with _opened(folder / f"{stage_name}-{key}.lock") as descriptor:
        began = next_line = time.monotonic()
        while not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder):
            holder = _read(os.pread(descriptor, 1000, 0))
            if not wait:
                raise HeldError(f"{stage_name}/{key} is being worked on by {_in_words(holder)}")
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
                log.warning("waits for %s %s, which is being computed by %s", stage_name, key[:12], _in_words(holder))
            time.sleep(_SECONDS_BETWEEN_TRIES)
            if time.monotonic() - began >= _MOST_SECONDS:
                raise HeldError(
                    f"{stage_name}/{key} is still being worked on by {_in_words(holder)}: {_MOST_SECONDS / 3600:g} "
                    "hours were waited for it",
                    cause="that process hangs, or was killed and has left another one behind",
                    fix="end it, and run again; if it computes, let it",
                )
        with suppress(OSError):  # a file that can only be read is a lock all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _me(), 0)
        yield


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Rely on what is in the store. Where nothing can be written nothing can be deleted either, so nothing is held.

    Args:
        folder: of the locks.
    """
    name = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = stack.enter_context(_opened(folder / "in-use"))
            with suppress(StoreError):  # then the file that follows must do
                if not _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, folder):
                    log.warning("waits until what is not needed is deleted from the store")
                    _flock(descriptor, fcntl.LOCK_SH, folder)
            (folder / "users").mkdir(exist_ok=True)
            (folder / "users" / name).write_bytes(_me())
            stack.callback((folder / "users" / name).unlink, missing_ok=True)
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have the store for oneself, to delete from it.

    Args:
        folder: of the locks.

    Raises:
        HeldError: a sweep is under way, or may be on another machine.
        StoreError: that cannot be told.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_opened(folder / "in-use"))
            free = _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
            users = {path: _read(path.read_bytes()) for path in sorted(folder.glob("users/*"))}
        except OSError as error:
            fact = f"whether a sweep is under way in {folder.parent} cannot be told: {error}"
            raise StoreError(fact, fix="delete nothing there, or make the store writable") from None
        for path, user in users.items():
            if not free or not _is_dead(user):
                raise HeldError(
                    f"a sweep is under way in {folder.parent}: {_in_words(user)}",
                    cause="" if not free else "it has not said that it has ended",
                    fix=f"try again when it has ended; if it was killed on another machine, delete {path}",
                )
            path.unlink(missing_ok=True)
        if not free:
            raise HeldError(f"a sweep is under way in {folder.parent}", fix="try again when it has ended")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file that is there to be locked; for writing, as some file systems ask for, if it may be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            raise error from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int, folder: Path) -> bool:
    """Lock an open file; False if it is locked by another and waiting was not asked for."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"files in {folder} cannot be locked: {error.strerror}",
            cause="the file system has no locks, or they are switched off",
            fix="have the store on one that has them",
        ) from None
    return True


def _me() -> bytes:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"host": platform.node(), "pid": os.getpid(), "since": since}).encode()


def _read(content: bytes) -> dict[str, Any]:
    """What `_me` has written; empty when it makes no sense."""
    with suppress(ValueError, TypeError, KeyError):
        said = json.loads(content)
        return {"host": str(said["host"]), "pid": int(said["pid"]), "since": str(said["since"])}
    return {}


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    where = "this machine" if holder["host"] == platform.node() else holder["host"]
    return f"process {holder['pid']} of {where} since {holder['since']}"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a process is known to have ended: one of this machine, and there is none of its number."""
    if not holder or holder["host"] != platform.node():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
