"""The Prefect of a store: a server and the process that serves the two deployments, one of each at a time.

artifacts/prefect/      PREFECT_HOME: the history of all runs
  owner.lock            held by the process that started the server
  users.lock            shared by those who use it; the owner stops the server only when nobody does
  api-url               where the server is
  server.log, serve.log
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from entropy_core.errors import ProbeError

ROOT = Path(__file__).resolve().parents[1]
"""Where this package lies. Prefect imports from the folder that a process is in before all others: from this one, then,
and not from a folder `flows` of the user's."""

FOLDER = "ENTROPY_PROBE_FOLDER"
"""The environment variable that says where the user is: a run goes there, and relative paths start there."""

HOME = Path("artifacts").absolute() / "prefect"
"""PREFECT_HOME, of the store that this process works for; see `use`."""

FLOW = "entropy-probe"
DEPLOYMENTS = ("checkpoint-sweep", "variance")

_STARTUP_SECONDS = 180
_GRACE_SECONDS = 15
_BUSY_SECONDS = 30
_FOREIGN = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE")  # of another server
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
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    unproxied = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", ""), "127.0.0.1"]
    return inherited | {
        "PREFECT_HOME": str(HOME),
        "PREFECT_API_URL": api_url,
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


def request(url: str, body: Any = None) -> Any:
    """Ask the server something, and again while it is busy: a 503 says that its database is locked at the moment.

    Args:
        url: address of the resource.
        body: JSON value to POST; None: GET.

    Returns:
        The JSON value of the answer.

    Raises:
        ServiceError: the server does not answer, or says no.
    """
    data = None if body is None else json.dumps(body).encode()
    question = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            with _direct.open(question, timeout=30) as answer:
                return json.load(answer)
        except OSError as error:
            if getattr(error, "code", None) == HTTPStatus.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            way_out = f"read {HOME / 'server.log'}"
            raise ServiceError(f"the Prefect server does not answer {url}: {error}", way_out=way_out) from None


@contextmanager
def service(port: int = 0, config: Path | None = None) -> Iterator[tuple[str, bool]]:
    """Hold the store's Prefect: the one that is up, or one that is started here and stopped at the end.

    Args:
        port: of the server, if it must be started; 0: any free one.
        config: a YAML file with which the form of the sweep begins; None: an empty form.

    Yields:
        The URL of its API, and whether it was started here. Both deployments are ready to run.

    Raises:
        ServiceError: the server or the serving process does not start.
    """
    HOME.mkdir(parents=True, exist_ok=True)
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
        api_url = f"http://127.0.0.1:{port or _free_port()}/api"
        _start(stack, api_url, ["--config", str(config.resolve())] if config else [])
        address.write_text(api_url)
        stack.callback(address.unlink, missing_ok=True)
        yield api_url, True
        if not _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB):
            print("Another sweep uses this server; it stops when that one is finished.", flush=True)
            _lock(users, fcntl.LOCK_EX)


def _start(stack: ExitStack, api_url: str, options: list[str]) -> None:
    """Start the server, then the process that serves the deployments; `stack` stops them in reverse order."""
    port = api_url.split(":")[2].removesuffix("/api")
    start = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    server = stack.enter_context(child(start, api_url, HOME / "server.log"))
    _wait(lambda: request(f"{api_url}/health"), server, "the Prefect server", HOME / "server.log")
    _end_orphans(api_url)
    started = datetime.now(UTC)
    serving = stack.enter_context(child(["-m", "flows.serve", *options], api_url, HOME / "serve.log"))
    stack.callback(_end_orphans, api_url)

    def ready() -> bool:
        found = [request(f"{api_url}/deployments/name/{FLOW}/{name}") for name in DEPLOYMENTS]
        times = [deployment[field] for deployment in found for field in ("updated", "last_polled")]
        return all(moment and datetime.fromisoformat(moment) >= started for moment in times)

    _wait(ready, serving, "flows.serve", HOME / "serve.log")

    def check(*_: Any) -> None:
        for name, process in (("server", server), ("serve", serving)):
            if process.poll() is not None:
                raise ServiceError(f"Prefect's {name} process ended", way_out=f"read {HOME / name}.log and start again")

    stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, check))


@contextmanager
def child(arguments: list[str], api_url: str, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run Python as a child process in a process group of its own; end the whole group on leaving.

    Args:
        arguments: of the interpreter.
        api_url: the server's API.
        log: file for its output; None: a pipe.

    Yields:
        The process.
    """
    with ExitStack() as stack:
        output = stack.enter_context(open(log, "w")) if log else subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(api_url),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
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


def _wait(ready: Callable[[], Any], process: subprocess.Popen[str], name: str, log: Path) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(ServiceError):
            if ready():
                return
        time.sleep(0.3)
    state = "ended" if process.poll() is not None else f"was not ready after {_STARTUP_SECONDS} seconds"
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "it printed nothing")
    raise ServiceError(f"{name} {state}: {last.strip()}", way_out=f"read {log}")


def _end_orphans(api_url: str) -> None:
    """Mark as crashed the runs that were under way when their process was ended; nothing runs here now."""
    with suppress(ServiceError):
        under_way = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
        for run in request(f"{api_url}/flow_runs/filter", under_way):
            state = {"type": "CRASHED", "message": "The process that ran it was stopped."}
            request(f"{api_url}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _lock(file: Any, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
