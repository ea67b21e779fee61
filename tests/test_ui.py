"""What a person does in the browser: a real server, a real Chromium, the demo run. Run by `make test-ui`.

It leaves the screenshots of the documentation in docs/, and nothing else.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
import yaml

from entropy_core.config.read import load_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.report.recorded_run import load_run
from entropy_core.store.store import Store
from flows import door, service
from flows.local import _task_runs

pytestmark = pytest.mark.ui

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("checkpoint-24", "checkpoint-30")
AROUND = dict.fromkeys(("plan", "results", *NAMES), "Completed")
"""Task runs that are of no stage."""
CONFIG = {
    "name": "demo",
    "checkpoints": [str(ROOT / "artifacts" / "demo-run" / name) for name in NAMES],
    "batch_config": {"E_total_sequences": 256, "B_U": 16, "G": 4},
    "generation": {"max_new_tokens": 32},
    "update": {"reward": "arithmetic"},
    "importance": {"etas": [0, 0.1, 0.3, 1]},
    "execution": {"shard_size": 128, "device": "cpu"},
}
LARGEST = 300_000
"""Bytes of a screenshot."""


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.fail("Chromium is needed: `apt-get install chromium`, or CHROMIUM=/path/to/it")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="entropy-probe-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def config_path(home: Path) -> Path:
    """A configuration whose sweep was run before, without Prefect."""
    path = home / "probe.yaml"
    execution = CONFIG["execution"] | {"artifacts": str(home / "artifacts")}
    path.write_text(yaml.safe_dump(CONFIG | {"execution": execution}))
    config = load_config(path)
    checkpoints, store = preflight(config), Store(config.store_root)
    sweep(config, checkpoints, store, direct_runner(store, execution_for(config, checkpoints)))
    return path


@pytest.fixture(scope="module")
def api(home: Path, config_path: Path) -> Iterator[str]:
    """What `make ui` keeps up; afterwards all of it is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "HOME", home / "prefect")
        with service.service(config=config_path) as (url, started_here):
            assert started_here
            yield url
        with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
            probe.connect(("127.0.0.1", urlsplit(url).port))


class Browser:
    """A page of the UI, and how a person finds things on it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.said: list[str] = []
        self.asked: set[str] = set()
        page.on("console", lambda message: self.said.append(message.text))
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("requestfailed", self._withdraw)

    def _withdraw(self, request: Any) -> None:
        if "csp" in str(request.failure).lower():  # the policy of our pages forbade it, and it was not sent
            self.asked.discard(request.url)

    def open_form(self, deployment: str) -> None:
        self.page.goto(f"{self.url}/deployments")
        self.page.get_by_role("link", name=deployment, exact=True).click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_text("Custom run").click()

    def field(self, label: str) -> Any:
        header = self.page.locator(":scope > .p-label__header .schema-form-property__label")
        return self.page.locator(".schema-form-property").filter(has=header.get_by_text(re.compile(f"^{label}\\b")))

    def open_run(self, run_id: str) -> None:
        self.page.goto(f"{self.url}/runs/flow-run/{run_id}")

    def click(self, name: str) -> None:
        """A button of the page of a run, and the one that says yes to what it asks."""
        self.page.get_by_role("button", name=name, exact=True).first.click()
        answers = self.page.locator(".p-modal button", has_text=re.compile(r"\w"))
        answers.filter(has_not_text="Close").last.click()

    def submit(self) -> str:
        """Send the form and go to the one run that it makes; returns the run's id."""
        before = {run["id"] for run in service.request(f"{self.url}/api/flow_runs/filter", {})}
        self.page.get_by_role("button", name="Submit").click()
        self.page.get_by_role("button", name="View run").first.wait_for()
        after = {run["id"] for run in service.request(f"{self.url}/api/flow_runs/filter", {})}
        [made] = after - before
        self.open_run(made)
        return made

    def wait_until(self, state: str = "Completed") -> None:
        badge = self.page.locator(".page-heading-flow-run__meta .state-badge")
        badge.get_by_text(state, exact=True).wait_for(timeout=480_000)

    def come_back_when(self, run_id: str, ended: Callable[[], bool]) -> None:
        """Wait with the page of a run closed: without a GPU, drawing its graph takes the core that the run needs."""
        self.page.goto("about:blank")
        eventually(ended)
        self.open_run(run_id)

    def tab(self, name: str) -> Any:
        tab = self.page.locator(".p-tab", has_text=name).first
        tab.click()
        return tab

    def task_runs(self, count: int) -> dict[str, str]:
        """Name → state, as the page lists them, once it lists so many."""
        items = self.page.locator(".task-run-list-item")
        deadline = time.monotonic() + 60
        while items.count() < count and time.monotonic() < deadline:
            items.last.scroll_into_view_if_needed()  # which makes it load more
            time.sleep(0.5)
        names = items.locator(".task-run-list-item__breadcrumbs").all_inner_texts()
        return dict(zip(names, items.locator(".state-badge").all_inner_texts(), strict=True))

    def open_artifact(self, key: str) -> None:
        """From the page of a run."""
        self.tab("Artifacts")
        self.page.get_by_text("Task runs", exact=True).scroll_into_view_if_needed()  # which makes it list theirs
        self.page.locator("a[href*=artifact]", has_text=key).first.click()
        self.page.locator(".page-heading").get_by_text(key, exact=True).wait_for()

    def fits(self, tables: Any) -> bool:
        """Whether all columns of the tables are seen at once."""
        tables.first.wait_for()
        return all(tables.evaluate_all("all => all.map(one => one.scrollWidth <= one.clientWidth)"))

    def show(self, name: str, top: Any = None) -> None:
        """Take a screenshot, with `top` at the top of it."""
        if top is not None:
            top.evaluate("element => element.scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(1000)
        path = ROOT / "docs" / f"{name}.png"
        self.page.screenshot(path=path)
        assert path.stat().st_size <= LARGEST


OF_THE_BROWSER = (".google.com", ".googleapis.com")
"""Chromium asks hosts of these names for itself, also with an empty page; what a page asks is seen without a proxy."""


def hosts(lines: list[str]) -> set[str]:
    """Those that a proxy was asked for, but for the browser's own."""
    addresses = [line.split()[1] for line in lines]
    named = {urlsplit(one if "://" in one else f"//{one}").hostname or one for one in addresses}
    return {host for host in named if not host.endswith(OF_THE_BROWSER)}


@pytest.fixture
def outside() -> Iterator[tuple[int, list[str]]]:
    """A proxy by which the browser would reach every other host: its port, and what it was asked. It answers nobody."""
    asked: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            if line := self.rfile.readline(65537):
                asked.append(line.decode("latin-1").strip())
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield http.server_port, asked
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(params=["dark"])
def browser(request: pytest.FixtureRequest, api: str, outside: tuple[int, list[str]]) -> Iterator[Browser]:
    """A page that is let in by the link that `make ui` prints, and asks nobody but the server."""
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError, reason="`make test-ui` installs it")
    url, (port, asked) = api.removesuffix("/api"), outside
    proxy = {"server": f"http://127.0.0.1:{port}", "bypass": "127.0.0.1"}
    with sync_api.sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"], proxy=proxy)
        page = chrome.new_page(viewport={"width": 1280, "height": 800})
        page.add_init_script(f"localStorage.setItem('color-scheme', '\"{request.param}\"')")
        browser = Browser(page, url)
        page.goto(door.how_to_enter(service.HOME, url, private=True))
        page.wait_for_url("**/dashboard")
        assert page.locator(f"html.{request.param}").count() == 1
        yield browser
        chrome.close()
    assert hosts(asked) == set() and {urlsplit(one).netloc for one in browser.asked} <= {urlsplit(url).netloc, ""}
    assert [line for line in browser.said if "Content Security Policy" in line] == []


def last_run(api: str) -> str:
    return service.request(f"{api}/flow_runs/filter", {"sort": "START_TIME_DESC"})[0]["id"]


def state_of(api: str, run_id: str) -> str:
    return service.request(f"{api}/flow_runs/{run_id}")["state"]["name"]


def states(api: str, run_id: str) -> dict[str, str]:
    """By name the state of each task run; of several of one name that of the last."""
    return {task["name"]: task["state_name"] for task in _task_runs(run_id, api)}


def rows_of(api: str, run_id: str) -> list[dict[str, Any]]:
    state = service.request(f"{api}/flow_runs/{run_id}")["state"]
    return pq.read_table(Path(state["message"].removeprefix("Results in ")) / "results.parquet").to_pylist()


def test_the_server_answers_this_machine_only(api):
    port = urlsplit(api).port
    with socket.create_connection(("127.0.0.1", port)):
        pass
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.2", port))  # this machine, too, if it listened to more than the one address


def test_a_sweep_from_the_form(browser, api):
    """Another confidence level and one more step size: the rest is cached, and the report has its plot."""
    browser.open_form("checkpoint-sweep")
    browser.field("Confidence Level").last.locator("input").fill("0.9")
    etas = browser.field("Etas").last
    assert [box.input_value() for box in etas.locator("input").all()] == ["0", "0.1", "0.3", "1"]
    etas.get_by_text("Add item").click()
    etas.locator("input").nth(4).fill("3")
    browser.show("ui-form", browser.field("Importance").last)
    run_id = browser.submit()
    browser.wait_until()

    browser.tab("Task Runs")
    shown = browser.task_runs(59 + len(AROUND))
    assert {name: shown.pop(name) for name in AROUND} == AROUND
    computed = Counter(name.partition(" ")[0] for name, state in shown.items() if state == "Completed")
    assert computed == {"importance": 4, "variance": 2, "report": 1}
    assert {name.split(" · ")[2] for name in shown if name.startswith("importance") and shown[name] == "Completed"} == {
        "η=3 lr"
    }
    assert Counter(shown.values()) == {"Completed": 7, "Cached": 52} and shown | AROUND == states(api, run_id)
    browser.page.evaluate("scrollTo(0, 0)")
    browser.show("ui-run")

    for key in ("plan", f"results-{NAMES[0]}"):
        browser.open_artifact(f"demo-{key}")
        assert browser.fits(browser.page.locator(".p-table"))
        browser.open_run(run_id)
    browser.open_artifact("demo-report")
    plot = browser.page.locator(".markdown-renderer img").first
    plot.wait_for()
    assert plot.evaluate("image => image.complete && image.naturalWidth") > 500
    browser.show("ui-report")

    rows = rows_of(api, run_id)
    assert {row["confidence_level"] for row in rows} == {0.9}
    assert {round(row["eta_over_lr"], 9) for row in rows} == {0, 0.1, 0.3, 1, 3}


@pytest.mark.parametrize("browser", ["dark", "light"], indirect=True)
def test_the_result_is_three_clicks_from_the_dashboard(browser, api, request):
    page, run = browser.page, service.request(f"{api}/flow_runs/{last_run(api)}")
    assert run["name"] == f"demo · {', '.join(NAMES)}" and set(run["tags"]) == {"sweep", "demo", *NAMES}
    page.get_by_role("button", name="Runs", exact=True).click()
    page.get_by_role("link", name=run["name"]).first.click()
    graph, drawer = page.locator("canvas"), page.locator(".flow-run-graph-artifact-drawer")
    graph.wait_for()
    page.wait_for_timeout(3000)  # it draws itself
    box = graph.bounding_box()
    for x in range(int(box["width"]) - 150, 0, -40):  # the name of the summary, in the line below the bars
        page.mouse.click(box["x"] + x, box["y"] + box["height"] - 40, delay=50)
        page.wait_for_timeout(500)
        if drawer.is_visible():
            break
    answer = load_run(Path(run["state"]["message"]).name, browser_store(run)).answer
    drawer.get_by_text(answer[:60]).wait_for()
    assert answer in drawer.inner_text()
    assert browser.fits(drawer.locator(".p-table")) and drawer.locator("tbody tr").count() >= len(NAMES)
    if "dark" in request.node.name:
        browser.show("ui-summary")


def browser_store(run: dict[str, Any]) -> Path:
    return Path(run["state"]["message"].removeprefix("Results in ")).parents[1]


def test_the_statistics_again_from_the_form(browser, api):
    """The five lines of docs/rerun-the-statistics.md."""
    before = rows_of(api, last_run(api))
    browser.open_form("variance")
    browser.field("Confidence Level").last.locator("input").fill("0.8")
    run_id = browser.submit()
    browser.wait_until()
    tasks = browser.tab("Task Runs")
    expected = {f"variance · {name}": "Completed" for name in NAMES}
    expected |= {"agreement · demo": "Cached", "report · demo": "Completed", "results": "Completed"}
    assert browser.task_runs(5) == states(api, run_id) == expected
    browser.show("ui-variance", tasks)
    browser.open_artifact("demo-report")
    browser.page.get_by_text("intervals at 80 %").wait_for()
    browser.page.locator(".markdown-renderer img").first.wait_for()

    state = service.request(f"{api}/flow_runs/{run_id}")["state"]
    link = (Path(state["message"].removeprefix("Results in ")) / "flow-run.txt").read_text().splitlines()[0]
    lasting = f"http://127.0.0.1:{service.UI_PORT}"  # for this server ends with the run
    assert link.startswith(lasting)
    browser.page.goto(browser.url + link.removeprefix(lasting))
    browser.page.wait_for_url(f"**/runs/flow-run/{run_id}")

    after = rows_of(api, run_id)
    assert {row["confidence_level"] for row in after} == {0.8}
    assert [row["delta_h1"] for row in after] == [row["delta_h1"] for row in before]


def test_a_form_with_a_wrong_value_makes_no_run(browser, api):
    count = service.request(f"{api}/flow_runs/count", {})
    browser.open_form("checkpoint-sweep")
    browser.field("Confidence Level").last.locator("input").fill("95")
    browser.page.get_by_role("button", name="Submit").click()
    browser.page.get_by_text(re.compile("95.*greater than the maximum")).first.wait_for()
    assert service.request(f"{api}/flow_runs/count", {}) == count


def test_a_run_that_fails_says_why_in_the_ui(browser, api):
    browser.open_form("checkpoint-sweep")
    browser.field("Dataset Name").locator("textarea").fill("gsm9k")
    browser.submit()
    reason = browser.page.get_by_text("unknown dataset 'gsm9k'")
    browser.wait_until("Failed")
    browser.page.locator(".logs__log, [class*=log]", has_text="unknown dataset 'gsm9k'").first.wait_for()
    browser.tab("Details")
    browser.page.get_by_text("See More").first.click()  # the message is one line, and longer than its place
    reason.first.wait_for()


def test_suspend_resume_cancel_retry_and_a_second_run_that_waits(browser, api):
    """On a sweep that takes its time: another E in many shards."""
    browser.open_form("checkpoint-sweep")
    for label, value in (("E Batch Seed", 7), ("E Total Sequences", 2048)):
        browser.field(label).last.locator("input").fill(str(value))
    run_id = browser.submit()
    browser.wait_until("Running")
    eventually(lambda: len(states(api, run_id)) > 5)

    browser.open_form("variance")
    waits = browser.submit()
    browser.wait_until("Queued")
    browser.page.get_by_text(re.compile("^Waits until “demo · .*” has ended")).first.wait_for()

    browser.open_run(run_id)
    browser.click("Suspend")
    browser.wait_until("Suspended")
    browser.open_run(waits)
    browser.wait_until()  # its turn: the process of the other has ended with the stage in hand
    before = states(api, run_id)
    assert "Suspended" in map(before.get, NAMES) and "Running" not in before.values()
    browser.open_run(run_id)
    browser.wait_until("Suspended")
    browser.click("Resume")
    browser.wait_until("Running")
    eventually(lambda: "Cached" in states(api, run_id).values())
    browser.click("Cancel")
    browser.wait_until("Cancelled")
    browser.click("Retry")
    browser.wait_until("Running")
    browser.come_back_when(run_id, lambda: state_of(api, run_id) == "Completed")
    browser.wait_until()
    after = states(api, run_id)
    done = [name for name, state in before.items() if state in ("Completed", "Cached") and " · " in name]
    assert done and {after[name] for name in done} == {"Cached"}


def eventually(condition: Callable[[], bool], seconds: float = 480) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_no_page_that_a_click_reaches_asks_another_host(browser, api, outside):
    """The pages that links lead to, three deep, and the tabs of a run; what the policy forbids is not sent."""
    page, seen, ahead = browser.page, set(), ["/dashboard", f"/runs/flow-run/{last_run(api)}"]
    for _ in range(3):
        found = []
        for path in ahead:
            page.goto(browser.url + path)
            page.wait_for_timeout(1500)
            for tab in page.locator(".p-tab:visible").all():
                tab.click()
                page.wait_for_timeout(300)
            found += page.locator("a[href^='/']").evaluate_all("all => all.map(one => one.getAttribute('href'))")
        seen |= set(map(kind, ahead))
        ahead = list({kind(path): path for path in found if kind(path) not in seen}.values())
    assert len(seen) >= 20 and "/settings" in seen
    assert hosts(outside[1]) == set()
    browser.said.clear()  # of pictures that the policy has kept from being asked for


def kind(path: str) -> str:
    """Pages of one kind have one address but for the id."""
    return re.sub("[0-9a-f-]{36}", "ID", path)


def test_the_command_line_says_it_too(api, home):
    environment = service.environment(api)
    command = [sys.executable, "-m", "prefect", "deployment", "run", f"{service.FLOW}/checkpoint-sweep", "--watch"]
    for parameter, said in (
        ('config={"checkpoints": []}', "config.checkpoints"),
        ('config={"checkpoints": ["nowhere"]}', f"no directory matches {Path.cwd() / 'nowhere'}"),
    ):
        done = subprocess.run(
            [*command, "--param", parameter], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert said in done.stdout + done.stderr


def test_a_work_pool_runs_the_deployments(api, home, config_path):
    """The commands of docs/deploy.md, on this server; the pool's deployments take the place of those served."""
    environment = service.environment(api)
    commands = re.findall(r"^(?:prefect work-pool|entropy-probe serve|prefect worker) .*", deploy_page(), re.MULTILINE)
    create, register, work = commands
    assert work.startswith("prefect worker start")
    for command in (create, register.replace("my-run.yaml", str(config_path))):
        run = [sys.executable, "-m", *re.sub("^entropy-probe", "flows.cli", command).split()]
        subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    deployment = service.request(f"{api}/deployments/name/{service.FLOW}/variance")
    assert deployment["work_pool_name"] == "probe"
    made = service.request(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    with service.child(["-m", *work.split()], api, home / "worker.log"):
        deadline = time.monotonic() + 240
        while (state := service.request(f"{api}/flow_runs/{made['id']}")["state"])["type"] != "COMPLETED":
            assert state["type"] in ("SCHEDULED", "PENDING", "RUNNING") and time.monotonic() < deadline, state
            time.sleep(1)
    of_the_run = {"agreement · demo", "report · demo", "results"}
    assert set(states(api, made["id"])) == {f"variance · {name}" for name in NAMES} | of_the_run


def deploy_page() -> str:
    return (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
