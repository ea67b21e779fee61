"""A real server, a real runner, and kill -9: of the flow, of the server, of the runner; Cancel and Retry as in the UI.

What the UI's buttons do is one request each, and these requests are made here. Part of `make chaos`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psutil
import pytest
from pipeline_fixtures import make_run, probe, values
from test_chaos import complete, contents, unfinished
from websockets.sync.client import connect

from flows import door, service
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

    def start(self, *arguments: str, listener: socket.socket | None = None) -> subprocess.Popen:
        context = child(list(arguments), self.api, service.HOME / f"{len(self.stack)}.log", listener)
        self.stack.append(context)
        return context.__enter__()

    def start_server(self) -> None:
        with door.listen(urlsplit(self.api).port) as listener:
            self.server = self.start("-m", "flows.server", str(listener.fileno()), listener=listener)
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
    made = values(home / "run", home / artifacts, batch_config=batch, importance={"etas": [0, 0.5, 1]})
    return made | {"update": made["update"] | {"reward": [made["update"]["reward"]]}}  # as a form posts it


@pytest.fixture(scope="module")
def prefect(home) -> Iterator[Prefect]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "HOME", home / "prefect")
        door.make_private(service.HOME)
        door.make_key(service.HOME)
        with door.listen(0) as listener:
            api = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        stack: list = []
        prefect = Prefect(stack, api)
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
    foreign = silent_run_of_somebody_else(prefect)
    os.kill(prefect.serving.pid, signal.SIGKILL)
    os.kill(flow, signal.SIGKILL)
    killed = time.monotonic()
    prefect.start_serving()
    assert prefect.state(run) == "RUNNING", "nobody was left to say so"
    until(lambda: prefect.state(run) == "CRASHED", MINUTES)
    print(f"marked as crashed after {time.monotonic() - killed:.0f} s")
    time.sleep(10)  # the other fell silent a moment before ours
    assert prefect.state(foreign) == "RUNNING", "nobody has asked us to look after it"
    before = complete(home / "runner")
    prefect.ask(run, "SCHEDULED", "AwaitingRetry")
    finished(prefect, home, run, "runner", before)


def silent_run_of_somebody_else(prefect: Prefect) -> str:
    """A run of another flow on the same server, which sends one heartbeat and no other."""
    flow = request(f"{prefect.api}/flows/", {"name": "of-somebody-else"})["id"]
    run = request(f"{prefect.api}/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
    heartbeat = {
        "event": "prefect.flow-run.heartbeat",
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [{"prefect.resource.id": f"prefect.flow.{flow}", "prefect.resource.role": "flow"}],
    }
    with connect(f"{prefect.api.replace('http', 'ws')}/events/in", subprotocols=["prefect"], proxy=None) as stream:
        stream.send(json.dumps({"type": "auth", "token": door.read_key(service.HOME)}))
        assert json.loads(stream.recv(timeout=30))["type"] == "auth_success"
        stream.send(json.dumps(heartbeat))
    return run


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


def if_free(port: int) -> socket.socket | None:
    try:
        return door.listen(port)
    except door.DoorError:
        return None


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_sweep_says_that_its_server_was_killed_and_goes_on_the_next_time(home):
    config = home / "sweep.yaml"
    config.write_text(json.dumps(settings(home, "command")))
    command = [sys.executable, "-m", "flows.cli", "sweep", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(complete(home / "command")) >= 12 or process.poll() is not None, MINUTES)
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
        ours = {args: int(pid) for pid, parent, args in rows if int(parent) == process.pid}
        [server] = [pid for args, pid in ours.items() if "flows.server" in args]
        [serving] = [pid for args, pid in ours.items() if "flows.serve" in args and pid != server]
        port = urlsplit((home / "command" / "prefect" / "api-url").read_text()).port
        os.kill(server, signal.SIGKILL)
        with until(lambda: if_free(port), MINUTES):
            assert not running(serving), "nobody takes the port while there is somebody who trusts it"
        _, said = process.communicate(timeout=MINUTES)
    assert process.returncode == 2
    assert said.strip().splitlines()[-1].startswith("Prefect's server process ended.")
    assert "Traceback" not in said
    before = complete(home / "command")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * MINUTES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(map(int, re.findall(r"\n  reused +(\d+) stage run", done.stdout))) >= len(before)
    assert before.items() <= complete(home / "command").items()
    assert contents(home / "command") == contents(home / "undisturbed")


@pytest.mark.attack("a foreign Prefect with a run under way is on the port")
def test_a_foreign_prefect_on_the_port_is_left_alone(home):
    """It has a run under way; it is told nothing, and nothing of it is ended."""
    config = home / "squatted.yaml"
    config.write_text(json.dumps(settings(home, "squatted")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with door.listen(0) as listener:
        port = listener.getsockname()[1]
    environment |= {"PREFECT_HOME": str(home / "foreign"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    start = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    api = environment["PREFECT_API_URL"]
    with subprocess.Popen(start, cwd=home, env=environment, stdout=subprocess.DEVNULL) as foreign:
        try:
            until(lambda: answers(f"{api}/health"), MINUTES)
            flow = request(f"{api}/flows/", {"name": "of-somebody-else"})["id"]
            run = request(f"{api}/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
            up = [sys.executable, "-m", "flows.cli", "ui", str(config), "--port", str(port)]
            done = subprocess.run(up, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 2
            assert f"port {port} cannot be used" in done.stderr and f"process {foreign.pid}" in done.stderr
            time.sleep(5)
            assert request(f"{api}/flow_runs/{run}")["state"]["type"] == "RUNNING"
            assert request(f"{api}/deployments/count", {}) == 0
            assert request(f"{api}/automations/count", {}) == 0
        finally:
            foreign.terminate()
