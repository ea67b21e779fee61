"""What was found of the code of a function, for later processes: finding it anew takes a second for a few stages.

It holds as long as no module that was read for it has changed. In the user's cache folder, a file for each function;
one that is not as it was written, or that others could have written, is not believed. See `files.cache_folder`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entropy_core.files.cache_folder import cache_folder, open_own, replace_own

LARGEST = 2**22
"""Bytes of a file that is read."""

_FINDER = hashlib.sha256(
    b"\0".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
"""Digest of the package that finds the code, as it was loaded."""


def recall(name: str, fingerprint: Callable[[str], str]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Return what is known of a function.

    Args:
        name: of the function.
        fingerprint: of a module as it is now, by its name.

    Returns:
        The fingerprint of each module that was read for it, and what was found; None where nothing is known, or a
        module is another now.
    """
    try:
        with open_own(_path(name), os.O_RDONLY) as file:
            content = file.read(LARGEST) or b""
        digest, _, text = content.partition(b"\n")
        if digest.decode() != _digest(name, text):
            return None
        read, found = json.loads(text)
    except (OSError, RuntimeError, ValueError):
        return None
    return (read, found) if all(fingerprint(module) == known for module, known in read.items()) else None


def remember(name: str, read: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Keep what was found of a function, see `recall`; where that cannot be done, nothing happens."""
    text = json.dumps([read, found]).encode()
    try:
        path = _path(name)
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_own(path, f"{_digest(name, text)}\n".encode() + text)
    except (OSError, RuntimeError):
        pass


def _path(name: str) -> Path:
    return cache_folder() / "code" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _digest(name: str, text: bytes) -> str:
    """Of an entry, and of what finds the code: another Python parses other trees, and this package may change."""
    return hashlib.sha256(json.dumps([name, sys.version, _FINDER]).encode() + text).hexdigest()
