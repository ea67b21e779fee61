"""Nobody gets in: whoever has no key, whoever has the port, whoever is another user. A real server, on loopback."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psutil
import pytest
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from flows import door, heartbeat, service
from flows.heartbeat import NAME, watch_heartbeats

OPEN = ("/health", "/ready")  # they say that a server is up, and nothing else
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Of the server, in a folder that every user of the machine may enter."""
    with tempfile.TemporaryDirectory(prefix="entropy-probe-") as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        patch.setattr(service, "HOME", Path(folder) / "prefect")
        yield service.HOME


@pytest.fixture(scope="module")
def api(home: Path) -> Iterator[str]:
    with service.service() as (url, started_here):
        assert started_here
        yield url


def status(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
    """What a request without the key is answered with."""
    question = urllib.request.Request(url, body, headers, method=method)
    try:
        with service._direct.open(question, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def routes(api: str) -> list[tuple[str, str]]:
    paths = service.request(f"{api}/openapi.json")["paths"]
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in paths.items()
        for method in methods
    ]


@pytest.mark.attack("a process without the key asks every route of the server")
def test_every_route_asks_for_the_key(api):
    found = routes(api)
    assert len(found) > 150 and ("PATCH", "/deployments/id") in found
    let_in = {(method, path) for method, path in found if status(api + path, method) != 401}
    assert let_in == {("GET", path) for path in OPEN}
    wrong = {"Authorization": "Basic ZW50cm9weS1wcm9iZTo="}
    assert status(f"{api}/flow_runs/count", "POST", b"{}", **wrong) == 401
    assert service.request(f"{api}/flow_runs/count", {}) == 0


@pytest.mark.attack("a process without the key opens every stream of the server")
@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
@pytest.mark.parametrize("token", [None, "entropy-probe:"])
def test_so_does_every_stream(api, path, token):
    address = f"{api.replace('http', 'ws')}/{path}"
    with pytest.raises(ConnectionClosed), connect(address, subprotocols=["prefect"], proxy=None) as stream:
        stream.send(json.dumps({"type": "auth", "token": token}))
        assert json.loads(stream.recv(timeout=30))["type"] != "auth_success"
        stream.recv(timeout=30)


@pytest.mark.attack("a page of another origin asks whether it may ask the server")
def test_a_page_of_another_origin_is_told_nothing(api):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert status(f"{api}/flow_runs/filter", "OPTIONS", Origin=EVIL, **asked) == 400
    assert status(f"{api}/flow_runs/filter", "OPTIONS", Origin=api.removesuffix("/api"), **asked) == 200
    with service._direct.open(urllib.request.Request(f"{api}/health", headers={"Origin": EVIL})) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] is None
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.attack("a request under a foreign name of this machine (DNS rebinding)")
@pytest.mark.parametrize("host", ["evil.example", "evil.example:4200", "127.0.0.1.evil.example", "0.0.0.0", ""])
@pytest.mark.parametrize("path", ["api/health", "", "ui-settings", "enter"])
def test_a_foreign_name_of_this_machine_is_refused(api, host, path):
    """As a page has it whose name was made to mean 127.0.0.1 after it was loaded."""
    url = f"{api.removesuffix('api')}{path}"
    assert status(url, Host=host) == 400
    assert status(url, Host="localhost:9999") == 200


def test_there_is_one_ui_and_it_asks_nobody_else(api):
    url = api.removesuffix("api")
    with service._direct.open(f"{url}ui-settings") as answer:
        settings = json.load(answer)
    assert settings["available_uis"] == ["v1"] and settings["auth"] == "BASIC" and settings["api_url"] == "/api"
    assert status(f"{url}v2/dashboard", Cookie="prefect_ui_version=v2") == 404


ASKS_ITSELF = """
import asyncio
from flows.server import application
from prefect.server.api.clients import OrchestrationClient
application()
async def ask():
    async with OrchestrationClient() as client:
        print((await client._http_client.get("/admin/version")).status_code)
asyncio.run(ask())
"""


def test_the_server_still_reaches_itself(api):
    """As its automations do, under the name prefect-in-memory."""
    command = [sys.executable, "-c", ASKS_ITSELF]
    settings = service.environment(api)
    done = subprocess.run(command, cwd=service.ROOT, env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200"]


def ours() -> list[psutil.Process]:
    running = psutil.Process().children(recursive=True)
    return [one for one in running if "multiprocessing." not in " ".join(one.cmdline())]  # Python's, of other tests


@pytest.mark.attack("somebody lists processes, folders and logs for the key")
def test_the_key_is_read_by_its_user_only(api, home):
    key = door.read_key(home)
    assert key.startswith("entropy-probe:") and len(key) > 40
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(door.key_file(home).stat().st_mode) == 0o600
    running = ours()
    assert len(running) >= 2
    assert not [one for one in running if key.partition(":")[2] in " ".join(one.cmdline())]
    assert all(one.environ()["PREFECT_API_AUTH_STRING"] == key for one in running)
    for log in home.glob("*.log"):
        assert key.partition(":")[2] not in log.read_text()


AS_ANOTHER = """
import http.client, os, sys
port, *paths = sys.argv[1:]
door = http.client.HTTPConnection("127.0.0.1", int(port))
door.request("GET", "/api/health")
assert door.getresponse().read() == b"true"  # and by now Python has read all that it needs of its own
os.setgroups([]), os.setgid(65534), os.setuid(65534)
for path in paths:
    try:
        print("read", os.listdir(path) if os.path.isdir(path) else open(path, "rb").read())
    except PermissionError:
        pass
for path in ("admin/database/clear", "flow_runs/filter", "deployments/filter"):
    door.request("POST", f"/api/{path}", b'{"confirm": true}', {"Content-Type": "application/json"})
    answer = door.getresponse()
    if answer.status != 401:
        print(path, answer.read())
    answer.read()
"""


@pytest.mark.attack("another user reads the server's folder and processes, and asks it")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_of_the_machine_gets_nothing(api, home):
    paths = [home, *home.iterdir(), *(f"/proc/{one.pid}/environ" for one in ours())]
    assert len(paths) > 8
    command = [sys.executable, "-c", AS_ANOTHER, str(urlsplit(api).port), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_who_comes_later_uses_the_same_server(api, home):
    with service.service(port=1) as (url, started_here):
        assert (url, started_here) == (api, False)
        assert service.request(f"{url}/deployments/count", {}) == len(service.DEPLOYMENTS)


def state_of(api: str, run: str) -> str:
    return service.request(f"{api}/flow_runs/{run}")["state"]["type"]


@pytest.mark.attack("runs of somebody else on the same server while ours are ended")
def test_only_the_runs_of_our_deployments_are_ours_to_end(api):
    running = {"state": {"type": "RUNNING"}}
    flow = service.request(f"{api}/flows/", {"name": "of-somebody-else"})["id"]
    same_name = service.request(f"{api}/flows/", {"name": service.FLOW})["id"]
    theirs = [
        service.request(f"{api}/flow_runs/", running | {"flow_id": one})["id"] for one in (flow, same_name)
    ]  # the second was called by hand, not by the deployment
    of_their_deployment = service.request(f"{api}/deployments/", {"name": "variance", "flow_id": flow})["id"]
    theirs.append(service.request(f"{api}/deployments/{of_their_deployment}/create_flow_run", running)["id"])
    deployment = service.request(f"{api}/deployments/name/{service.FLOW}/variance")["id"]
    mine = service.request(f"{api}/deployments/{deployment}/create_flow_run", running)["id"]
    service._end_orphans(api)
    assert [state_of(api, run) for run in (*theirs, mine)] == ["RUNNING"] * 3 + ["CRASHED"]


@pytest.mark.attack("runs of somebody else on the same server fall silent")
def test_only_the_runs_of_our_deployments_are_missed(api, home):
    """What was told to a server by an older version of this project, which meant every run, is taken back."""

    def trigger() -> EventTrigger:
        [told] = [one for one in service.request(f"{api}/automations/filter", {}) if one["name"] == NAME]
        return EventTrigger.model_validate(told["trigger"])

    def covers(deployment: str) -> bool:
        run = Resource({"prefect.resource.id": "prefect.flow-run.1"})
        related = {"prefect.resource.id": f"prefect.deployment.{deployment}", "prefect.resource.role": "deployment"}
        return trigger().covers_resources(run, [RelatedResource(related)])

    ids = [service.request(f"{api}/deployments/name/{service.FLOW}/{name}")["id"] for name in service.DEPLOYMENTS]
    assert [covers(one) for one in (*ids, "of-somebody-else")] == [True] * len(ids) + [False]
    told = {PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: door.read_key(home)}
    with temporary_settings(told):
        watch_heartbeats(ids[:1])
        assert [covers(one) for one in ids] == [True] + [False] * (len(ids) - 1)
        watch_heartbeats(ids)
        assert [covers(one) for one in ids] == [True] * len(ids)


def send_heartbeat(api: str, run: str, deployment: str) -> None:
    """As the process of a run does."""
    related = {"prefect.resource.id": f"prefect.deployment.{deployment}", "prefect.resource.role": "deployment"}
    event = {
        "event": "prefect.flow-run.heartbeat",
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [related],
    }
    with connect(f"{api.replace('http', 'ws')}/events/in", subprotocols=["prefect"], proxy=None) as stream:
        stream.send(json.dumps({"type": "auth", "token": door.read_key(service.HOME)}))
        assert json.loads(stream.recv(timeout=30))["type"] == "auth_success"
        stream.send(json.dumps(event))


def test_a_suspended_run_stays_suspended_and_a_silent_one_has_crashed(api, home, monkeypatch):
    """The stage in hand sends a heartbeat after Suspend and no other. The limit is what the page sets by itself."""
    monkeypatch.setattr(heartbeat, "SILENCE", timedelta(seconds=10))
    ids = [service.request(f"{api}/deployments/name/{service.FLOW}/{name}")["id"] for name in service.DEPLOYMENTS]
    with temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: door.read_key(home)}):
        watch_heartbeats(ids)
    running = {"state": {"type": "RUNNING"}}
    suspended, silent = (
        service.request(f"{api}/deployments/{ids[1]}/create_flow_run", running)["id"] for _ in range(2)
    )
    limit = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    details = {"pause_reschedule": True, "pause_timeout": limit}
    asked = {"state": {"type": "PAUSED", "name": "Suspended", "state_details": details}}
    assert service.request(f"{api}/flow_runs/{suspended}/set_state", asked)["status"] == "ACCEPT"
    for run in (suspended, silent):
        send_heartbeat(api, run, ids[1])
    deadline = time.monotonic() + 60
    while state_of(api, silent) != "CRASHED" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (state_of(api, suspended), state_of(api, silent)) == ("PAUSED", "CRASHED")
    assert service.request(f"{api}/flow_runs/{suspended}/resume", {})["status"] == "ACCEPT"
    assert service.request(f"{api}/flow_runs/{suspended}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


@pytest.fixture
def foreign() -> Iterator[tuple[int, list[str]]]:
    """A server that answers everything as Prefect would: its port, and what it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield http.server_port, asked
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.attack("a foreign server waits on the port and answers as Prefect would")
def test_a_port_that_is_taken_is_refused_before_anything_starts(foreign, tmp_path, monkeypatch):
    port, asked = foreign
    monkeypatch.setattr(service, "HOME", tmp_path / "prefect")
    monkeypatch.setattr(service, "child", lambda *_: pytest.fail("something was started"))
    with pytest.raises(door.DoorError, match=f"port {port} .*in use.* by process {os.getpid()} of .*python"):
        service.service(port).__enter__()
    assert asked == []
    assert not door.key_file(service.HOME).exists()


def test_a_server_that_does_not_start_is_said_to_and_leaves_the_port(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "HOME", tmp_path / "prefect")
    door.make_private(service.HOME)
    (service.HOME / "prefect.db").write_bytes(b"no database" * 100)
    taken: list[socket.socket] = []
    listen = door.listen
    monkeypatch.setattr(door, "listen", lambda port: taken.append(listen(port)) or taken[0])
    with pytest.raises(service.ServiceError, match=r"server process ended: .*read .*server\.log"):
        service.service().__enter__()
    assert taken[0].fileno() == -1
    assert not (service.HOME / "api-url").exists()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be(port):
    with pytest.raises(door.DoorError, match=f"port {port} cannot be used"):
        door.listen(port)


def test_a_port_is_ours_from_the_beginning():
    with door.listen(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(door.DoorError, match="already in use"):
            door.listen(port)
        with socket.socket() as probe, pytest.raises(OSError):
            probe.bind(("127.0.0.1", port))


def test_a_key_of_the_users_own_is_asked_for_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "HOME", tmp_path)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:mine")
    door.make_key(tmp_path)
    settings = service.environment("http://127.0.0.1:1/api")
    assert settings["PREFECT_API_AUTH_STRING"] == settings["PREFECT_SERVER_API_AUTH_STRING"] == "me:mine"
    assert "mine" not in door.how_to_enter(tmp_path, "http://127.0.0.1:1", private=True)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "of-the:server")
    door.make_key(tmp_path)
    assert door.read_key(tmp_path) == "of-the:server"


def test_each_start_has_another_key_and_only_a_terminal_shows_it(tmp_path, monkeypatch):
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    door.make_key(tmp_path)
    first = door.read_key(tmp_path)
    door.make_key(tmp_path)
    second = door.read_key(tmp_path)
    assert first != second
    assert door.how_to_enter(tmp_path, "http://127.0.0.1:1", private=True) == f"http://127.0.0.1:1/enter#{second}"
    assert second not in door.how_to_enter(tmp_path, "http://127.0.0.1:1", private=False)


@pytest.mark.attack("the environment names a database that others share")
def test_settings_of_other_servers_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "HOME", tmp_path)
    shared = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://everybody",
        "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://everybody",
        "PREFECT_API_KEY": "pnu_1",
        "PREFECT_PROFILE": "team",
        "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
        "PREFECT_RUNNER_SERVER_ENABLE": "true",
    }
    for name, value in (shared | {"PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_API_SSL_CERT_FILE": "ours.pem"}).items():
        monkeypatch.setenv(name, value)
    settings = service.environment("http://127.0.0.1:1/api")
    assert not shared.keys() & settings.keys()
    assert (settings["PREFECT_LOGGING_LEVEL"], settings["PREFECT_API_SSL_CERT_FILE"]) == ("DEBUG", "ours.pem")


def test_a_folder_of_another_user_is_not_entered(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(door.DoorError, match="belongs to another user"):
        door.make_private(tmp_path)


def test_a_folder_that_everybody_reads_is_closed(tmp_path):
    folder = tmp_path / "prefect"
    folder.mkdir(mode=0o755)
    door.make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
