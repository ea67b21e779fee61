"""What a piece of work does to the world outside its folder, and that it ends: for tests of hostile input.

    with watched(folder) as seen:
        ...                       # Hang after `LIMIT` seconds
    assert seen.outside == []     # files written, programs started, names looked up, code unpickled

What Python does is seen by an audit hook, which stays for as long as the process lives and is off between watches.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 20
"""Seconds until a piece of work counts as hung."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    **{"os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chown": ((0, 3),), "os.utime": ((0, 3),)},
}
"""Audit events that change files; which arguments say which, and the folder that a relative path starts at."""
_REACHES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.connect",
    "socket.sendto",
    "pickle.find_class",
    "webbrowser.open",
}


_GUARD = "from entropy_core.isolation.guard import main"
"""What starts the process that code of the user's runs in, within limits; what it may do is seen in test_isolation."""


class Hang(BaseException):
    """It did not end; not an Exception, which the code under test might catch."""


@dataclass
class Seen:
    """What was done outside the folder: the event, and to what."""

    folder: Path
    outside: list[str] = field(default_factory=list)

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES:
                self._changed(event, path)
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._changed(event, arguments[path], -1 if folder is None else arguments[folder])
        elif event in _REACHES and _GUARD not in repr(arguments):
            self.outside.append(f"{event} {arguments!r:.200}")

    def _changed(self, event: str, path: Any, folder: int = -1) -> None:
        if isinstance(path, int):  # an open file, whose opening was seen
            return
        start = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
        text = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if text != os.devnull and not text.startswith(f"{self.folder}{os.sep}"):
            self.outside.append(f"{event} {text}")


_looks: list[Callable[[str, tuple[Any, ...]], None]] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _looks:
        look = _looks.pop()  # what looking does is not looked at
        try:
            look(event, arguments)
        finally:
            _looks.append(look)


@contextmanager
def watched(folder: Path, limit: float = LIMIT) -> Iterator[Seen]:
    """See what is done outside a folder within the context, and end what does not end.

    Args:
        folder: where files may be written; a folder of the test's own.
        limit: in seconds.

    Raises:
        Hang: it takes longer.
    """
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)

    def hung(*_: object) -> None:
        raise Hang(f"not ended after {limit} seconds")

    seen = Seen(Path(os.path.realpath(folder)))
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, limit)
    _looks.append(seen.look)
    try:
        yield seen
    finally:
        _looks.remove(seen.look)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.dont_write_bytecode = writes_bytecode
