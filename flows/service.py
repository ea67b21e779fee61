"""The Prefect of a store: a server and the process that serves the three deployments, one of each at a time.

artifacts/prefect/      PREFECT_HOME: the history of all runs; for this user only
  owner.lock            held by the process that started the server
  users.lock            shared by those who use it; the owner stops the server only when nobody does
  api-url               where the server is
  auth-string           what it asks for: see `door`
  server.log, serve.log

The settings of the user's own for other servers are left out, above all the address of a shared database, of which
every run would seem to be this folder's.
"""

import base64
import ctypes
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any

from entropy_core.errors import ProbeError
from flows import door

ROOT = Path(__file__).resolve().parents[1]
"""Where this package lies. Prefect imports from the folder that a process is in before all others: from this one, then,
and not from a folder `flows` of the user's."""

FOLDER = "ENTROPY_PROBE_FOLDER"
"""The environment variable that says where the user is: a run goes there, and relative paths start there."""

HOME = Path("artifacts").absolute() / "prefect"
"""PREFECT_HOME, of the store that this process works for; see `use`."""

FLOW = "entropy-probe"
DEPLOYMENTS = ("checkpoint-sweep", "variance", "interventions")
UI_PORT = 4200
"""Of `entropy-probe ui`, if none is named. A link to a run is to be followed there once a server of its own is gone."""
QUEUED = "Queued"
"""Name of the state of a run that waits for another; see `waiting`."""

_STARTUP_SECONDS = 180
_GRACE_SECONDS = 15
_BUSY_SECONDS = 30
_OF_OTHER_SERVERS = re.compile("PREFECT_(API|SERVER|UI|CLOUD|PROFILE|MESSAGING|RUNNER_SERVER|CLIENT_CUSTOM_HEADERS)")
_OF_TRANSPORT = ("PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServiceError(ProbeError):
    """The server or the process that serves the deployments did not start, or ended."""


def use(store_root: Path) -> None:
    """Work for a store: its Prefect keeps the history of its runs in it.

    Args:
        store_root: folder of the store.
    """
    global HOME
    HOME = store_root.absolute() / "prefect"


def environment(api_url: str) -> dict[str, str]:
    """Make the environment of everything that talks to the store's server.

    Args:
        api_url: the server's API.

    Returns:
        This process's environment with Prefect's settings: the store's own history, nothing sent to anybody, log lines
        streamed to whoever watches a run.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name in _OF_TRANSPORT or not _OF_OTHER_SERVERS.match(name)
    }
    key = door.read_key(HOME)
    unproxied = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", ""), "127.0.0.1"]
    return inherited | {
        "PREFECT_HOME": str(HOME),
        "PREFECT_API_URL": api_url,
        "PREFECT_API_AUTH_STRING": key,
        "PREFECT_SERVER_API_AUTH_STRING": key,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": api_url.removesuffix("/api"),
        "PREFECT_UI_API_URL": "/api",  # of the page's own origin, also at the near end of a tunnel
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the newer UI calls an outside host from the browser
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "entropy_probe",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",  # seconds; or log lines come after the events they precede
        "COLUMNS": "1000",  # what watches a run shall not break lines
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",  # seconds
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; a run that misses three in a row is marked as crashed
        FOLDER: os.getcwd(),
        "NO_PROXY": ",".join(filter(None, unproxied)),
        "no_proxy": ",".join(filter(None, unproxied)),
    }


def request(url: str, body: Any = None, timeout: float = 30.0) -> Any:
    """Ask this folder's server something, and again while it is busy: a 503 says that its database is locked.

    Args:
        url: address of the resource.
        body: JSON value to POST; None: GET.
        timeout: for one answer, in seconds.

    Returns:
        The JSON value of the answer.

    Raises:
        ServiceError: the server does not answer, or says no.
    """
    data = None if body is None else json.dumps(body).encode()
    key = base64.b64encode(door.read_key(HOME).encode()).decode()
    question = urllib.request.Request(url, data, {"Content-Type": "application/json", "Authorization": f"Basic {key}"})
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            with _direct.open(question, timeout=timeout) as answer:
                return json.load(answer)
        except OSError as error:
            if getattr(error, "code", None) == HTTPStatus.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            fix = f"read {HOME / 'server.log'}"
            raise ServiceError(f"the Prefect server does not answer {url}: {error}", fix=fix) from None


@contextmanager
def service(port: int = 0, config: Path | None = None) -> Iterator[tuple[str, bool]]:
    """Hold the store's Prefect: the one that is up, or one that is started here and stopped at the end.

    Args:
        port: of the server, if it must be started; 0: any free one.
        config: a YAML file with which the form of the sweep begins; None: an empty form.

    Yields:
        The URL of its API, and whether it was started here. Both deployments are ready to run.

    Raises:
        DoorError: something else listens on the port.
        ServiceError: the server or the serving process does not start.
    """
    door.make_private(HOME)
    address = HOME / "api-url"
    with open(HOME / "owner.lock", "w") as owner, open(HOME / "users.lock", "w") as users, ExitStack() as stack:
        while not _lock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _lock(users, fcntl.LOCK_SH)
            if address.exists():
                yield address.read_text(), False
                return
            _lock(users, fcntl.LOCK_UN)  # it is starting or stopping
            time.sleep(0.5)
        address.unlink(missing_ok=True)
        listener = stack.enter_context(door.listen(port))
        api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        door.make_key(HOME)
        options = ["--config", str(config.resolve())] if config else []
        _start(stack, listener, api_url, options, lasting_address(api_url, started_here=not port))
        address.write_text(api_url)
        stack.callback(address.unlink, missing_ok=True)
        yield api_url, True
        if not _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB):
            print("Another sweep uses this server; it stops when that one is finished.", flush=True)
            _lock(users, fcntl.LOCK_EX)


def lasting_address(api_url: str, started_here: bool) -> str:
    """Where the pages of a server are found later on.

    Args:
        api_url: of the server.
        started_here: whether it is stopped when the run is over.
    """
    return f"http://127.0.0.1:{UI_PORT}" if started_here else api_url.removesuffix("/api")


def _start(stack: ExitStack, listener: socket.socket, api_url: str, options: list[str], links: str) -> None:
    """Start the server, then the process that serves the deployments; `stack` stops them in reverse order."""
    start = ["-m", "flows.server", str(listener.fileno())]
    server = stack.enter_context(child(start, api_url, HOME / "server.log", listener))
    _wait(lambda: request(f"{api_url}/health", timeout=2), server=server)
    _end_orphans(api_url)
    started = datetime.now(UTC)
    serve = child(["-m", "flows.serve", *options], api_url, HOME / "serve.log", also={"PREFECT_UI_URL": links})
    serving = stack.enter_context(serve)
    stack.callback(_end_orphans, api_url)

    def ready() -> bool:
        found = [request(f"{api_url}/deployments/name/{FLOW}/{name}", timeout=5) for name in DEPLOYMENTS]
        times = [deployment[field] for deployment in found for field in ("updated", "last_polled")]
        return all(moment and datetime.fromisoformat(moment) >= started for moment in times)

    _wait(ready, serve=serving, server=server)

    def check(*_: Any) -> None:
        if server.poll() is not None:
            with suppress(ProcessLookupError):  # it would run what it is told by whoever takes the port next
                os.killpg(serving.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                serving.wait(_GRACE_SECONDS)
            listener.close()
        for name, process in (("server", server), ("serve", serving)):
            if process.poll() is not None:
                raise ServiceError(f"Prefect's {name} process ended", fix=f"read {HOME / name}.log and start again")

    stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, check))


@contextmanager
def child(
    arguments: list[str],
    api_url: str,
    log: Path | None = None,
    listener: socket.socket | None = None,
    also: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[subprocess.Popen[str]]:
    """Run Python as a child process in a process group of its own; end the whole group on leaving.

    Args:
        arguments: of the interpreter.
        api_url: the server's API.
        log: file for its output; None: a pipe.
        listener: a socket that it inherits.
        also: what else is in its environment.

    Yields:
        The process.
    """
    with ExitStack() as stack:
        output = stack.enter_context(open(log, "w")) if log else subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**environment(api_url), **also},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=[listener.fileno()] if listener else [],
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield process
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    """Called in the child: be told to end when the parent dies without a chance to say so."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(ready: Callable[[], Any], **processes: subprocess.Popen[str]) -> None:
    """Wait until something is so, as long as these live; each is called as its log is."""
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline and all(process.poll() is None for process in processes.values()):
        with suppress(ServiceError):
            if ready():
                return
        time.sleep(0.3)
    name = next((name for name, process in processes.items() if process.poll() is not None), next(iter(processes)))
    state = f"was not ready after {_STARTUP_SECONDS} seconds" if processes[name].poll() is None else "ended"
    log = HOME / f"{name}.log"
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "it printed nothing")
    raise ServiceError(f"Prefect's {name} process {state}: {last.strip()}", fix=f"read {log}")


def _end_orphans(api_url: str) -> None:
    """Mark as crashed the runs of the served deployments that were under way; nothing serves them now.

    Other flows of the user's on this server, and runs that a work pool has given to a worker, are not ours to end.
    """
    under_way = {
        "flows": {"name": {"any_": [FLOW]}},
        "deployments": {"name": {"any_": list(DEPLOYMENTS)}},
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
    }
    with suppress(ServiceError):
        for run in request(f"{api_url}/flow_runs/filter", under_way):
            if run["work_pool_name"]:
                continue
            state = {"type": "CRASHED", "message": "The process that ran it was stopped."}
            request(f"{api_url}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _lock(file: Any, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    return True
