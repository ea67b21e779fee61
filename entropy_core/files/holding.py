"""Keep the files of a directory that somebody else may delete: by hard links, or by copies where links cannot be.

A hard link costs no space while the other name exists, and keeps the content when that name is deleted. Links are made
within one disk only, and not by every file system. What is held is complete: it is made beside its place, compared with
what was to be held, and then gets its name in one step.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

_HALF, _GONE = ".half-", ".gone-"  # being made, and being deleted

Listing = tuple[tuple[str, int, int], ...]
"""Of each file in a directory, at any depth: its relative path, its size, its mtime in nanoseconds; sorted."""


def listing(directory: Path) -> Listing:
    """List the files of a directory as they are now.

    Raises:
        FileNotFoundError: there is no such directory, or one of its files was deleted meanwhile.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    stats = ((path, path.stat()) for path in directory.rglob("*") if not path.is_dir())
    return tuple(sorted((path.relative_to(directory).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats))


def digest_of(listed: Listing) -> str:
    """Identify a listing: 32 hex digits. Files of the same sizes and times are taken to be the same."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def hold(source: Path, target: Path, listed: Listing) -> bool:
    """Hold the files of a directory under another path, which they get together or not at all.

    Args:
        source: the directory.
        target: where; replaced if it is there.
        listed: the files, from `listing`.

    Returns:
        Whether links were enough. If not, some of the files were copied.

    Raises:
        FileNotFoundError: the files are no longer as listed; nothing is held.
        OSError: nothing can be written there.
    """
    half = target.with_name(f"{_HALF}{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        linked = [_link_or_copy(source / name, half / name) for name, *_ in listed]
        if listing(half) != listed:
            raise FileNotFoundError(f"the files of {source} changed while they were linked")
        release(target)
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return all(linked)


def held_in(folder: Path) -> list[Path]:
    """The directories that are held in a folder. What a process left that was killed is deleted."""
    if not folder.is_dir():
        return []
    for path in folder.glob(f"{_GONE}*"):
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def release(target: Path) -> None:
    """Delete what is held; it loses its name in one step."""
    if target.exists():
        gone = target.with_name(f"{_GONE}{target.name}")
        shutil.rmtree(gone, ignore_errors=True)
        target.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve(strict=True)  # the file that a symbolic link names
    try:
        os.link(source, target)
        return True
    except FileNotFoundError:
        raise
    except OSError:  # another disk, a file of another user, a file system without links
        shutil.copy2(source, target)
        return False
