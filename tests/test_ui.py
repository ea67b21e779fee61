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
import time
from collections import Counter
from collections.abc import Iterator
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
from entropy_core.store.store import Store
from flows import door, service

pytestmark = pytest.mark.ui

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("checkpoint-24", "checkpoint-30")
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

    def open_form(self, deployment: str) -> None:
        self.page.goto(f"{self.url}/deployments")
        self.page.get_by_role("link", name=deployment, exact=True).click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_text("Custom run").click()

    def field(self, label: str) -> Any:
        header = self.page.locator(":scope > .p-label__header .schema-form-property__label")
        return self.page.locator(".schema-form-property").filter(has=header.get_by_text(re.compile(f"^{label}\\b")))

    def submit(self) -> str:
        """Send the form and go to the one run that it makes, by the message that says so; returns the run's id."""
        before = service.request(f"{self.url}/api/flow_runs/count", {})
        self.page.get_by_role("button", name="Submit").click()
        messages = self.page.get_by_role("button", name="View run")  # Prefect may show the same one twice, overlaid
        messages.last.dispatch_event("click")
        self.page.wait_for_url("**/runs/flow-run/*")
        assert service.request(f"{self.url}/api/flow_runs/count", {}) == before + 1
        return re.search(r"flow-run/([0-9a-f-]{36})", self.page.url)[1]

    def wait_until_completed(self) -> None:
        badge = self.page.locator(".page-heading-flow-run__meta .state-badge")
        badge.get_by_text("Completed", exact=True).wait_for(timeout=240_000)

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
        self.page.locator("a[href*=artifact]", has=self.page.get_by_text(key, exact=True)).first.click()
        self.page.locator(".page-heading").get_by_text(key, exact=True).wait_for()

    def show(self, name: str, top: Any = None) -> None:
        """Take a screenshot, with `top` at the top of it."""
        if top is not None:
            top.evaluate("element => element.scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(1000)
        path = ROOT / "docs" / f"{name}.png"
        self.page.screenshot(path=path)
        assert path.stat().st_size <= LARGEST


@pytest.fixture
def browser(api: str) -> Iterator[Browser]:
    """A page that is let in by the link that `make ui` prints, and asks nobody but the server."""
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError, reason="`make test-ui` installs it")
    url = api.removesuffix("/api")
    with sync_api.sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = chrome.new_page(viewport={"width": 1280, "height": 900})
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(door.how_to_enter(service.HOME, url, private=True))
        page.wait_for_url("**/dashboard")
        yield Browser(page, url)
        chrome.close()
    assert {urlsplit(one).netloc for one in asked} <= {urlsplit(url).netloc, ""}  # data: has no host
    assert [line for line in said if "Content Security Policy" in line] == []


def states(api: str, run_id: str) -> dict[str, str]:
    tasks = service.request(f"{api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    return {task["name"]: task["state"]["name"] for task in tasks}


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
    browser.wait_until_completed()

    tasks = browser.tab("Task Runs")
    shown = browser.task_runs(57)
    computed = Counter(name.partition(" ")[0] for name, state in shown.items() if state == "Completed")
    assert computed == {"importance": 4, "variance": 2, "report": 1}
    assert {name.split(" · ")[2] for name in shown if name.startswith("importance") and shown[name] == "Completed"} == {
        "η=3 lr"
    }
    assert Counter(shown.values()) == {"Completed": 7, "Cached": 50} and shown == states(api, run_id)
    browser.show("ui-run", tasks)

    browser.open_artifact("report")
    plot = browser.page.locator(".markdown-renderer img").first
    plot.wait_for()
    assert plot.evaluate("image => image.complete && image.naturalWidth") > 500
    browser.show("ui-report")

    rows = rows_of(api, run_id)
    assert {row["confidence_level"] for row in rows} == {0.9}
    assert {round(row["eta_over_lr"], 9) for row in rows} == {0, 0.1, 0.3, 1, 3}


def test_the_statistics_again_from_the_form(browser, api):
    """The five lines of docs/rerun-the-statistics.md."""
    before = rows_of(api, service.request(f"{api}/flow_runs/filter", {"sort": "START_TIME_DESC"})[0]["id"])
    browser.open_form("variance")
    browser.field("Confidence Level").last.locator("input").fill("0.8")
    run_id = browser.submit()
    browser.wait_until_completed()
    tasks = browser.tab("Task Runs")
    expected = {f"variance · {name}": "Completed" for name in NAMES}
    expected |= {"agreement · demo": "Cached", "report · demo": "Completed"}
    assert browser.task_runs(4) == states(api, run_id) == expected
    browser.show("ui-variance", tasks)
    browser.open_artifact("report")
    browser.page.get_by_text("intervals at 80 %").wait_for()
    browser.page.locator(".markdown-renderer img").first.wait_for()

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
    browser.page.locator(".page-heading-flow-run__meta .state-badge").get_by_text("Failed").wait_for(timeout=120_000)
    browser.tab("Details")
    browser.page.get_by_text("See More").first.click()  # the message is one line, and longer than its place
    reason.first.wait_for()


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
        run = [sys.executable, "-m", *command.replace("entropy-probe", "flows.cli").split()]
        subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    deployment = service.request(f"{api}/deployments/name/{service.FLOW}/variance")
    assert deployment["work_pool_name"] == "probe"
    made = service.request(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    with service.child(["-m", *work.split()], api, home / "worker.log"):
        deadline = time.monotonic() + 240
        while (state := service.request(f"{api}/flow_runs/{made['id']}")["state"])["type"] != "COMPLETED":
            assert state["type"] in ("SCHEDULED", "PENDING", "RUNNING") and time.monotonic() < deadline, state
            time.sleep(1)
    of_the_run = {"agreement · demo", "report · demo"}
    assert set(states(api, made["id"])) == {f"variance · {name}" for name in NAMES} | of_the_run


def deploy_page() -> str:
    return (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
