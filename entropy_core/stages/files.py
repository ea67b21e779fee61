"""Files of the user that a result depends on: found by their digest, and still what they were."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_core.checkpoint_files import file_digest
from entropy_core.errors import ConfigError, ProbeError

if TYPE_CHECKING:
    from entropy_core.execution import Execution


def content_digest(path: Path) -> str:
    """Content digest of a file; of a folder, that of the data files in it by their names, wherever the folder lies.

    Args:
        path: of the file or the folder.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in {".parquet", ".arrow", ".json"})
    digests = {file.relative_to(path).as_posix(): file_digest(file) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def user_file(execution: "Execution", source: str, digest: Callable[[Path], str] = content_digest) -> Path:
    """Where the file or folder with this content lies.

    Args:
        execution: knows the paths.
        source: its digest.
        digest: what made that.

    Raises:
        ConfigError: it is not there any more, or holds something else.
    """
    path = execution.paths.get(source)
    try:
        if path is not None and digest(path) == source:
            return path
    except (OSError, ProbeError):
        pass
    raise ConfigError(
        f"{path or 'a file that the configuration names'} changed after the sweep had begun",
        cause="it was edited or deleted meanwhile",
        way_out="run the sweep again: what does not depend on it is reused",
    )
