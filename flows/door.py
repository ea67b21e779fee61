"""Who gets in: the port that the server listens on, the key that it asks for, the folder that nobody else reads.

    artifacts/prefect/              0700
      auth-string                   0600: the key, as Prefect's clients take it in PREFECT_API_AUTH_STRING

The port is bound here, before anything starts, and handed to the server as an open socket. So nothing has to be
recognised: what answers on the port is ours, because nobody else can listen there.

The key is made anew at every start. Whoever takes the port when we have left it may be told the last key by a browser
that still shows our page; it opens nothing any more.
"""

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from entropy_core.errors import ProbeError

USER = "entropy-probe"
_OWN = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")


class DoorError(ProbeError):
    """The port is taken, or the folder is not ours."""


def listen(port: int) -> socket.socket:
    """Take a port of this machine for ourselves.

    Args:
        port: its number; 0: any free one.

    Returns:
        A socket that listens on 127.0.0.1.

    Raises:
        DoorError: something else listens there, or ports like that are not ours to take.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        fact = f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}"
        raise DoorError(fact + _taken_by(port), fix="name another port; 0 takes any that is free") from None
    return listener


def _taken_by(port: int) -> str:
    """Who listens on a port, as far as the system says."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                if not connection.pid:
                    return ", by a process of another user"
                process = psutil.Process(connection.pid)
                return f", by process {process.pid} of {process.username()}, {' '.join(process.cmdline())[:120]}"
    return ""


def make_private(folder: Path) -> None:
    """Make a folder if there is none, and let nobody else in.

    Args:
        folder: where the key and Prefect's history lie.

    Raises:
        DoorError: it is somebody else's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        owner = folder.stat().st_uid
    except OSError as error:
        raise DoorError(f"{folder} cannot be made private: {error.strerror}", fix="move it away") from None
    if owner != os.geteuid():
        raise DoorError(f"{folder} belongs to another user (uid {owner})", fix="move it away, or work in a copy")


def make_key(folder: Path) -> None:
    """Write the key of a server that is about to start: the user's own auth string, else a new secret.

    Args:
        folder: made private.
    """
    own = (os.environ.get(name, "") for name in _OWN)
    key = next(filter(None, own), f"{USER}:{secrets.token_urlsafe(32)}")
    descriptor, path = tempfile.mkstemp(dir=folder)  # for its owner's eyes only
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(key)
    os.replace(path, key_file(folder))


def key_file(folder: Path) -> Path:
    """Where the key of this folder's server lies."""
    return folder / "auth-string"


def read_key(folder: Path) -> str:
    """Read the key of this folder's server; empty: none was started here yet."""
    try:
        return key_file(folder).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def how_to_enter(folder: Path, url: str, private: bool) -> str:
    """Say how a browser gets in.

    Args:
        folder: made private.
        url: of the server's pages.
        private: whether nobody but the user reads what is said here.

    Returns:
        A link that logs in, where the key was made here and may be shown; else the page, and where its password is.
    """
    key = read_key(folder)
    if private and key.startswith(f"{USER}:"):
        return f"{url}/enter#{key}"
    return f"{url} (the password is in {key_file(folder)})"
