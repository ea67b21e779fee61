"""The data files of an artifact: what its manifest says of each, and how they are checked against that.

Large files are read no more often than needed: that a file is there and has its size is enough until it is opened.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entropy_core.files.digests import Identity, file_digest, identity_of
from entropy_core.files.regular import NotAFileError, require_readable

VECTORS = "vectors/"
"""Where an artifact has its files of the size of the policy. Their digests count for good; they themselves may go."""
DROPPED = "vectors.dropped"
"""Says that they went on purpose: without it, they are lost."""

_altered: set[Identity] = set()  # files that were opened and found to be others


def describe(path: Path) -> dict[str, Any]:
    """Make the manifest's entry for a file: its size and SHA-256, and the shapes or the schema of what is in it."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        entry["tensors"] = {name: {"dtype": of["dtype"], "shape": of["shape"]} for name, of in header.items()}
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(path)
        entry["num_rows"] = metadata.num_rows
        entry["schema"] = metadata.schema.to_arrow_schema().to_string(show_schema_metadata=False)
    return entry


def check_files(
    directory: Path, files: Mapping[str, Mapping[str, Any]], digest: Callable[[Path], str] | None = None
) -> str:
    """Check the data files of an artifact against their entries in the manifest, but for `VECTORS` that were dropped.

    Args:
        directory: of the artifact.
        files: file name → entry.
        digest: see `check_file`; None: that a file is there and has its size is enough.

    Returns:
        What is wrong first, or "".
    """
    dropped = (directory / DROPPED).exists()
    for name, entry in files.items():
        path = directory / name
        if dropped and name.startswith(VECTORS):
            continue
        if fault := check_file(path, entry, digest) if digest else check_presence(path, entry):
            return fault
    return ""


def check_presence(path: Path, entry: Mapping[str, Any]) -> str:
    """Check that a data file is there, is as large as its entry in the manifest says, and was not found to be altered.

    Nothing of it is read: `check_file` does that when the file is opened.

    Returns:
        What is wrong, or "".
    """
    try:
        stat = require_readable(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    except NotAFileError as error:
        return f"{path.name} is no file: {error.strerror}"
    if stat.st_size != entry.get("bytes"):
        return f"{path.name} has {stat.st_size} bytes instead of {entry.get('bytes')}"
    return _alteration(path) if identity_of(stat) in _altered else ""


def check_file(path: Path, entry: Mapping[str, Any], digest: Callable[[Path], str] = file_digest) -> str:
    """Check a data file against its entry in the manifest, its content included.

    Args:
        path: the file.
        entry: of the manifest.
        digest: how its content is digested, such as `file_digests.read_digest`, which trusts nothing but the disk.

    Returns:
        What is wrong, or "".
    """
    fault = check_presence(path, entry)
    if not fault and digest(path) != entry["sha256"]:
        _altered.add(identity_of(path.stat()))
        fault = _alteration(path)
    return fault


def _alteration(path: Path) -> str:
    return f"{path.name} was altered: its SHA-256 is another"
