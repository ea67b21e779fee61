"""The user's cache folder, for what processes tell later ones. Without it everything is only slower.

A file that others could have written is neither believed nor touched.
"""

import io
import os
import secrets
import stat as mode
from pathlib import Path


def cache_folder() -> Path:
    """Say where it is. Raises RuntimeError where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "entropy-probe"


def open_own(path: Path, flags: int) -> io.RawIOBase:
    """Open a file that nobody else could have written.

    Args:
        path: of the file.
        flags: `O_RDONLY`, or others of `os.open`.

    Returns:
        The file, for reading; with `O_RDWR` also for writing.

    Raises:
        OSError: there is none, it is a link, or it or its folder belongs to others or can be written by them.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    file = io.FileIO(descriptor, "r+" if flags & os.O_RDWR else "r")
    for stat in (os.fstat(descriptor), os.stat(path.parent)):
        if stat.st_uid != os.geteuid() or stat.st_mode & (mode.S_IWGRP | mode.S_IWOTH):
            file.close()
            raise PermissionError(f"{path} could have been written by somebody else")
    return file


def replace_own(path: Path, content: bytes) -> None:
    """Write a file that replaces another one whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
