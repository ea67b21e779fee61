"""Prove that a worker and its driver have the same store, and that locks and renames in it are seen by both.

    driver   writes .locks/workers/<token> and holds its lock
    worker   reads it, finds the lock held, does not find <token>.driver, and renames a file to <token>.worker
    driver   finds <token>.worker, and renames a file to <token>.driver
    worker   finds <token>.driver

The worker has looked for the name before it is there, since a file server may remember that it was not.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_core.errors import StoreError
from entropy_core.store import locks

SECONDS = 5.0
"""In which a renamed file must be seen: a stage is begun when the manifests that it reads are visible."""

_FIX = "have the store on a file system that all workers mount at the same path, with locks that they share"


def require_shared(root: Path, whose: str, ask: Callable[..., Any]) -> None:
    """Make sure that a worker has the store of this process.

    Args:
        root: of the store.
        whose: the worker, for the message.
        ask: `ask(name, *arguments)` calls one of the functions below in the worker and returns what it returns.

    Raises:
        StoreError: it has another one, or one in which it does not see what is locked and written here.
    """
    folder, token, content = root / ".locks", secrets.token_hex(8), secrets.token_hex(16)
    offered = folder / "workers" / token
    offered.parent.mkdir(parents=True, exist_ok=True)
    try:
        offered.write_text(content)
        with locks.key_lock(folder, "workers", token):
            found, held = ask("find_token", root, token)
        if found != content:
            raise StoreError(
                f"{whose} has another store at {root}",
                cause="that folder is not shared with the machine that it runs on",
                fix=_FIX,
            )
        if held:
            raise StoreError(
                f"{whose} does not see the locks of this process in {root}: {held}",
                cause="a network file system that is mounted without shared locks",
                fix=_FIX,
            )
        if not _seen(offered.with_suffix(".worker")) or not _renamed(offered, ".driver", ask, root, token):
            raise StoreError(
                f"{whose} and this process do not see within {SECONDS:g} s what the other has renamed in {root}",
                cause="a network file system that caches what a folder contains for longer",
                fix="mount it with a shorter attribute cache, such as actimeo=1 of NFS",
            )
    finally:
        for path in offered.parent.glob(f"{token}*"):
            path.unlink(missing_ok=True)
        (folder / f"workers-{token}.lock").unlink(missing_ok=True)


def _renamed(offered: Path, suffix: str, ask: Callable[..., Any], root: Path, token: str) -> bool:
    offered.rename(offered.with_suffix(suffix))
    return bool(ask("see_rename", root, token))


def _seen(path: Path) -> bool:
    until = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def find_token(root: Path, token: str) -> tuple[str, str]:
    """In the worker: read what the driver has written, and try the lock that it holds.

    Args:
        root: of the store.
        token: name of the file.

    Returns:
        Its content, empty if it is not there; and what is wrong with the lock, empty if it is held by another.
    """
    offered = root / ".locks" / "workers" / token
    try:
        content = offered.read_text()
    except OSError:
        return "", ""
    offered.with_suffix(".driver").exists()
    try:
        with locks.key_lock(root / ".locks", "workers", token, wait=False):
            wrong = "what it holds could be locked again"
    except locks.HeldError:
        wrong = ""
    except StoreError as error:
        wrong = error.fact
    mine = offered.with_suffix(".mine")
    mine.touch()
    mine.rename(offered.with_suffix(".worker"))
    return content, wrong


def see_rename(root: Path, token: str) -> bool:
    """In the worker: tell whether the file that the driver has renamed is seen in time."""
    return _seen(root / ".locks" / "workers" / f"{token}.driver")
