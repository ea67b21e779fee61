"""Files that can be read to an end."""

import errno
import os
import stat
from pathlib import Path


def require_readable(path: Path) -> Path:
    """Refuse what is there in place of a file and would be waited for, or never end: a pipe, a device.

    Args:
        path: of a file, which may be missing.

    Returns:
        The path.

    Raises:
        OSError: it leads to something else, to itself, or nowhere.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # whoever opens a folder is told so
        raise OSError(errno.EINVAL, "it is a pipe or a device, and not a file", str(path))
    return path
