"""Files of the user that a result depends on: found by their digest, and still what they were."""

from pathlib import Path
from typing import TYPE_CHECKING

from entropy_core.checkpoint_files import file_digest
from entropy_core.errors import ConfigError

if TYPE_CHECKING:
    from entropy_core.execution import Execution


def user_file(execution: "Execution", source: str) -> Path:
    """Where the file with this content lies.

    Args:
        execution: knows the paths.
        source: digest of the file.

    Raises:
        ConfigError: the file is not there any more, or holds something else.
    """
    path = execution.paths.get(source)
    try:
        if path is not None and file_digest(path) == source:
            return path
    except OSError:
        pass
    raise ConfigError(
        f"{path or 'a file that the configuration names'} changed after the sweep had begun",
        cause="it was edited or deleted meanwhile",
        way_out="run the sweep again: what does not depend on it is reused",
    )
