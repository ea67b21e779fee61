"""Files that can be read to an end."""

import errno
import os
import stat
from pathlib import Path


class NotAFileError(OSError):
    """What is in place of a file is none."""


def require_readable(path: Path) -> Path:
    """Refuse what is there in place of a file and would be waited for, or never end: a pipe, a device.

    Args:
        path: of a file, which may be missing.

    Returns:
        The path.

    Raises:
        NotAFileError: there is a pipe, a device, or a link that leads to itself.
        OSError: there is nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotAFileError(errno.ELOOP, "it is a link that leads to itself", str(path)) from None
        raise
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # whoever opens a folder is told so
        raise NotAFileError(errno.EINVAL, "it is a pipe or a device, and not a file", str(path))
    return path
