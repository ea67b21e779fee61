"""A real server, a real runner, and kill -9: of the flow, of the server, of the runner; Cancel and Retry as in the UI.

What the UI's buttons do is one request each, and these requests are made here. Part of `make chaos`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import make_run, probe, values
from test_chaos import complete, contents, unfinished

from flows import service
from flows.cli import main
from flows.service import FLOW, child, request

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).resolve().parents[1]
SOON, MINUTES = 60, 240  # seconds


def until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return [int(one) for one, parent, stat in rows if int(parent) == pid and not stat.startswith("Z")]


class Prefect:
    """A server and a process that serves the deployments, started apart so that each can be killed by itself."""

    def __init__(self, stack: list, api: str) -> None:
        self.stack, self.api = stack, api
        self.server = self.serving = None

    def start(self, *arguments: str) -> subprocess.Popen:
        context = child(list(arguments), self.api, service.HOME / f"{len(self.stack)}.log")
        self.stack.append(context)
        return context.__enter__()

    def start_server(self) -> None:
        port = self.api.split(":")[2].removesuffix("/api")
        self.server = self.start("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
        until(lambda: answers(f"{self.api}/health"), MINUTES)

    def start_serving(self) -> None:
        self.serving = self.start("-m", "flows.serve")
        until(lambda: answers(f"{self.api}/deployments/name/{FLOW}/checkpoint-sweep"), MINUTES)

    def trigger(self, config: dict) -> str:
        deployment = request(f"{self.api}/deployments/name/{FLOW}/checkpoint-sweep")["id"]
        return request(f"{self.api}/deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})["id"]

    def state(self, run: str) -> str:
        return request(f"{self.api}/flow_runs/{run}")["state"]["type"]

    def ask(self, run: str, state: str, name: str = "") -> None:
        body = {"state": {"type": state, "name": name or state.capitalize()}}
        assert request(f"{self.api}/flow_runs/{run}/set_state", body)["status"] == "ACCEPT"

    def task_states(self, run: str) -> Counter:
        tasks = request(f"{self.api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return Counter(task["state"]["name"] for task in tasks)


def answers(url: str) -> bool:
    try:
        request(url)
    except service.ServiceError:
        return False
    return True


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_run(folder / "run")
    probe(settings(folder, "undisturbed"))
    return folder


def settings(home: Path, artifacts: str) -> dict:
    batch = {"E_total_sequences": 32, "B_U": 4, "G": 4}
    return values(home / "run", home / artifacts, batch_config=batch, importance={"etas": [0, 0.5, 1]})


@pytest.fixture(scope="module")
def prefect(home) -> Iterator[Prefect]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "HOME", home / "prefect")
        service.HOME.mkdir()
        stack: list = []
        prefect = Prefect(stack, f"http://127.0.0.1:{service._free_port()}/api")
        try:
            prefect.start_server()
            prefect.start_serving()
            yield prefect
        finally:
            while stack:
                stack.pop().__exit__(None, None, None)


def under_way(prefect: Prefect, home: Path, name: str, artifacts: int) -> tuple[str, int]:
    """Trigger a sweep and let it finish some artifacts; its id, and the process of its flow."""
    run = prefect.trigger(settings(home, name))
    until(lambda: len(complete(home / name)) >= artifacts, MINUTES)
    [flow] = children(prefect.serving.pid)
    return run, flow


def finished(prefect: Prefect, home: Path, run: str, name: str, before: dict) -> None:
    until(lambda: prefect.state(run) in ("COMPLETED", "FAILED"), MINUTES)
    assert prefect.state(run) == "COMPLETED"
    assert before.items() <= complete(home / name).items(), "nothing that was finished was computed again"
    assert contents(home / name) == contents(home / "undisturbed")
    assert unfinished(home / name) == []


def test_a_flow_that_is_killed_is_marked_and_retry_goes_on(prefect, home):
    run, flow = under_way(prefect, home, "flow", 12)
    os.kill(flow, signal.SIGKILL)
    until(lambda: prefect.state(run) == "CRASHED", SOON)
    before = complete(home / "flow")
    prefect.ask(run, "SCHEDULED", "AwaitingRetry")  # the button Retry
    finished(prefect, home, run, "flow", before)


def test_a_flow_that_is_cancelled_stops_and_leaves_nothing_broken(prefect, home, capsys):
    run, flow = under_way(prefect, home, "cancelled", 12)
    prefect.ask(run, "CANCELLING")  # the button Cancel
    until(lambda: prefect.state(run) == "CANCELLED", SOON)
    until(lambda: not Path(f"/proc/{flow}").exists() or not children(prefect.serving.pid), SOON)
    before = complete(home / "cancelled")
    time.sleep(1)
    assert complete(home / "cancelled") == before, "nobody works any more"
    assert unfinished(home / "cancelled") == []
    assert main(["store", "verify", "--artifacts", str(home / "cancelled")]) == 0
    again = prefect.trigger(settings(home, "cancelled"))
    finished(prefect, home, again, "cancelled", before)
    until(lambda: prefect.task_states(again)["Cached"] >= 12, SOON)  # noted a little after the run has ended


def test_a_runner_that_is_killed_with_its_flow_is_missed_within_minutes(prefect, home):
    run, flow = under_way(prefect, home, "runner", 12)
    os.kill(prefect.serving.pid, signal.SIGKILL)
    os.kill(flow, signal.SIGKILL)
    killed = time.monotonic()
    prefect.start_serving()
    assert prefect.state(run) == "RUNNING", "nobody was left to say so"
    until(lambda: prefect.state(run) == "CRASHED", MINUTES)
    print(f"marked as crashed after {time.monotonic() - killed:.0f} s")
    before = complete(home / "runner")
    prefect.ask(run, "SCHEDULED", "AwaitingRetry")
    finished(prefect, home, run, "runner", before)


def test_a_server_that_is_killed_costs_a_shard_at_most(prefect, home):
    """Back at its place, the same command goes on; or even the run itself, if the server was not missed."""
    run, _ = under_way(prefect, home, "server", 12)
    os.killpg(prefect.server.pid, signal.SIGKILL)
    time.sleep(3)
    before = complete(home / "server")
    prefect.start_server()
    until(lambda: prefect.state(run) in ("COMPLETED", "FAILED", "CRASHED"), MINUTES)
    print(f"the run is {prefect.state(run)}")
    again = prefect.trigger(settings(home, "server"))
    finished(prefect, home, again, "server", before)
    until(lambda: prefect.task_states(again)["Cached"] >= 12, SOON)  # noted a little after the run has ended


def test_a_sweep_says_that_its_server_was_killed_and_goes_on_the_next_time(home):
    config = home / "sweep.yaml"
    config.write_text(json.dumps(settings(home, "command")))
    command = [sys.executable, "-m", "flows.cli", "sweep", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(complete(home / "command")) >= 12 or process.poll() is not None, MINUTES)
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
        [server] = [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "server start" in args]
        os.kill(server, signal.SIGKILL)
        _, said = process.communicate(timeout=MINUTES)
    assert process.returncode == 2
    assert said.strip().splitlines()[-1].startswith("Prefect's server process ended.")
    assert "Traceback" not in said
    before = complete(home / "command")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * MINUTES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n  reused ") >= len(before)
    assert before.items() <= complete(home / "command").items()
    assert contents(home / "command") == contents(home / "undisturbed")
