"""What an artifact's manifest says, and how it is written and verified.

The manifest is written last, when every data file is on the disk, so a directory that has one is complete. It holds
what the key is made of, the SHA-256 of every data file, the stage's summary, and how the result came about; and a seal,
the SHA-256 of all the rest, so that not a byte of it changes unnoticed. Against lies there is `signature`. What it says
of the data files is in `data_files`.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from entropy_core.errors import StoreError, one_line
from entropy_core.files.digests import SETTLED_NS, Identity, identity_of
from entropy_core.files.regular import NotAFileError, require_readable
from entropy_core.store.data_files import DROPPED, describe
from entropy_core.store.manifest_form import require_form
from entropy_core.store.signature import SIGNATURE, SignatureError, require_signature, signature

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
"""Begins the name of what is being written, or was left by a process that died."""
FORMAT = 1
"""Of what `Writer` makes of a stage's results, and `Artifact` of its files: raised when either changes."""

MOST_BYTES = 64 * 2**20
"""Of a manifest, or of the record of a run: a sweep of ten thousand shards has one of 2 MB."""

_AT_ONCE = 16  # files that the disk is asked for
_KEYED = ("format", "stage", "code", "libraries", "inputs")
_LIBRARIES = ("torch", "transformers", "peft", "pyarrow", "safetensors")

_STAGE = b'\n "stage": '
"""Before this line of a manifest are the seal and the signature, which its seal is not of."""

_manifests: dict[Identity, dict[str, Any]] = {}


def may_name(stage_name: Any, key: Any) -> bool:
    """Whether an artifact can be called so. What comes from a record or an archive may lead anywhere else."""
    return _matches(r"[a-z0-9]+(-[a-z0-9]+)*", stage_name) and _matches("[0-9a-f]{32}", key)


def may_name_file(name: str) -> bool:
    """Whether a data file of an artifact can be called so: it lies within the artifact and is not the manifest."""
    path = PurePosixPath(name)
    inside = str(path) == name and not path.is_absolute() and ".." not in path.parts
    return inside and name.isprintable() and name not in (".", MANIFEST, DROPPED)


def _matches(pattern: str, text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """Hash what makes a result.

    Args:
        recipe: format, stage, code, libraries and inputs as JSON values; a manifest has them among others, which do not
            count.

    Returns:
        The first 32 hex digits of the SHA-256 of the canonical JSON. 128 bits are enough: among a million million
        keys, the probability that any two agree is 1e-15; and directory names stay short.
    """
    return _sha256({name: recipe[name] for name in _KEYED})[:32]


def content_digest(files: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """Identify an artifact by its data: the SHA-256 of the canonical JSON of its files' SHA-256 and its summary.

    Args:
        files: file name → its entry in the manifest.
        summary: what the stage's function returned.

    Returns:
        64 hex digits.
    """
    return _sha256({"files": {name: entry["sha256"] for name, entry in files.items()}, "summary": summary})


def commit(
    temporary: Path, final: Path, manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Record every file in the manifest, bring all of it to the disk, and make it visible.

    Args:
        temporary: directory with the data files, beside `final`.
        final: what it will be called.
        manifest: all but `files` and `digest`.
        files: file name → its entry, where these are known; otherwise the files are read.

    Returns:
        The content digest.
    """
    if files is None:
        paths = sorted(temporary.rglob("*"))
        files = {path.relative_to(temporary).as_posix(): describe(path) for path in paths if path.is_file()}
    digest = content_digest(files, manifest["summary"])
    (temporary / MANIFEST).write_bytes(_sealed({**manifest, "files": files, "digest": digest}))
    make_visible(temporary, final)
    return digest


@contextmanager
def temporary_sibling(final: Path) -> Iterator[Path]:
    """A new directory beside `final`, to be filled and given its name; what is left of it at the end is deleted."""
    temporary = final.with_name(f"{TEMPORARY}{final.name}-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_visible(temporary: Path, final: Path) -> None:
    """Bring a directory and all that is in it to the disk, and give it its name in one step."""
    bring_to_disk([*temporary.rglob("*"), temporary])
    os.rename(temporary, final)
    bring_to_disk([final.parent, final.parent.parent])


def bring_to_disk(paths: Iterable[Path]) -> None:
    """Wait until files and directories are on the disk, which takes many hardly longer to say than one."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(_fsync, paths):
            pass


def check_manifest(directory: Path, stage_name: str, key: str) -> tuple[dict[str, Any], str]:
    """Read a manifest and check that it is of this artifact and as it was written.

    Args:
        directory: of the artifact.
        stage_name: name of its stage.
        key: its key.

    Returns:
        The manifest and "", or else an empty dict and what is wrong.

    Raises:
        SignatureError: it is as it was written, and not signed as it must be.
    """
    try:
        manifest = _read_once(directory / MANIFEST)
        if "format" not in manifest:
            return {}, "it was made by an earlier version"
        if (manifest["stage"], manifest["key"]) != (stage_name, key):
            return {}, f"its manifest is that of {manifest['stage']}/{manifest['key']}"
        if recipe_key(manifest) != key or content_digest(manifest["files"], manifest["summary"]) != manifest["digest"]:
            return {}, "its manifest was edited"
        if not may_name(stage_name, key) or not all(map(may_name_file, manifest["files"])):
            return {}, "its manifest names what is no part of it"
        require_signature(manifest.get(SIGNATURE), manifest["seal"], directory)
        return manifest, ""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}, "it has no manifest"
    except NotAFileError as error:
        return {}, f"its manifest is no file: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return {}, f"its manifest was damaged or edited: {one_line(error)}"


def as_json(value: Any, what: str) -> dict[str, Any]:
    """Make of a dict what will be read back from the manifest.

    Args:
        value: the dict.
        what: what it is, for the error message.

    Returns:
        The dict of JSON values.

    Raises:
        StoreError: it is no dict, or something in it is no JSON value.
    """
    try:
        plain = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} is not JSON: {error}", fix="use plain, finite values; write data to files") from error
    if not isinstance(plain, dict):
        raise StoreError(f"{what} is {value!r:.80} and not a dict")
    return plain


def json_text(value: Any) -> str:
    """JSON for a file, with sorted keys. Raises ValueError on a NaN or an infinity, TypeError on what is not JSON."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that make the numbers; and of Prefect, if it is loaded."""
    found = {"python": platform.python_version()}
    for library in (*_LIBRARIES, *({"prefect"} & sys.modules.keys())):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def peak_rss_bytes() -> int:
    """The most memory that this process has held since it started; the system counts in KiB, but on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _sha256(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is written: with its seal before `stage`, signed with the key that is set."""
    before, stage, after = json_text(manifest).encode().partition(_STAGE)
    seal = hashlib.sha256(before + stage + after).hexdigest()
    return before + _lines({"seal": seal, **signature(seal)}) + stage + after


def _lines(added: Mapping[str, Any]) -> bytes:
    """Of entries that are there among others: without the braces."""
    return json_text(added).encode()[1:-3] + b","


def sign(directory: Path, stage_name: str, key: str) -> str:
    """Sign a manifest with the key that is set, whatever key it was signed with; its lock is held.

    Args:
        directory: of the artifact.
        stage_name: name of its stage.
        key: its key.

    Returns:
        What is wrong with it, in which case nothing was changed; or "".
    """
    with suppress(SignatureError):
        fault = check_manifest(directory, stage_name, key)[1]
        if fault:
            return fault
    manifest = json.loads((directory / MANIFEST).read_bytes())
    with temporary_sibling(directory) as temporary:
        path = temporary / MANIFEST
        path.write_bytes(_sealed({name: value for name, value in manifest.items() if name not in ("seal", SIGNATURE)}))
        _fsync(path)
        path.replace(directory / MANIFEST)
    _fsync(directory)
    return ""


def _read_once(path: Path) -> dict[str, Any]:
    """The manifest, parsed once per process as long as the file does not change."""
    stat = require_readable(path).stat()
    if stat.st_size > MOST_BYTES:
        raise ValueError(f"it has {stat.st_size:,} bytes")
    identity = identity_of(stat)
    if identity not in _manifests:
        manifest = _parsed(path.read_bytes())
        if time.time_ns() - identity[-1] < SETTLED_NS:
            return manifest
        _manifests[identity] = manifest
    return _manifests[identity]


@lru_cache(maxsize=64)
def _parsed(content: bytes) -> dict[str, Any]:
    """Raises ValueError if it is not, byte for byte, what was written."""
    manifest = json.loads(content)
    json.dumps(manifest, allow_nan=False, ensure_ascii=False).encode()  # a seal of what cannot be written is no seal
    added = {name: manifest[name] for name in ("seal", SIGNATURE) if name in manifest}
    before, found, after = content.partition(_lines(added) + _STAGE)
    if not found or hashlib.sha256(before + _STAGE + after).hexdigest() != manifest["seal"]:
        raise ValueError("it is not as it was written")
    if "format" in manifest:  # else an earlier version made it, which is said in its own words
        require_form(manifest)
    return manifest
