"""The door as a browser meets it: a login, and nothing for a page of another origin. Run by `make test-ui`."""

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_ui import chromium

from flows import door, service

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "HOME", tmp_path_factory.mktemp("door") / "prefect")
        with service.service() as (api, _):
            yield api.removesuffix("/api")


@pytest.fixture
def page() -> Iterator[Any]:
    """One that has not logged in, in a browser that takes evil.example for this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError, reason="`make test-ui` installs it")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        chrome = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield chrome.new_context().new_page()
        chrome.close()


def enter(page: Any, url: str) -> None:
    page.goto(door.how_to_enter(service.HOME, url, private=True))
    page.wait_for_url("**/dashboard")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_without_the_key_there_is_a_login_and_nothing_else(page, url):
    page.goto(f"{url}/enter#entropy-probe:wrong")
    page.wait_for_url(re.compile("/login"))
    page.goto(f"{url}/deployments")
    page.wait_for_url(re.compile("/login"))
    page.locator("input[type=password]").fill(door.key_file(service.HOME).read_text())
    page.get_by_role("button", name="Login").click()
    page.get_by_role("link", name="checkpoint-sweep", exact=True).wait_for()


def test_the_link_logs_in_and_the_dashboard_offers_no_other_ui(page, url):
    enter(page, url)
    page.get_by_text("Flow Runs").or_(page.get_by_text("Run a task or flow")).first.wait_for()
    assert page.get_by_text("V2 UI").count() == 0


ATTACK = """
async ({url, deployment}) => {
    const tried = [
        [`${url}/api/flow_runs/filter`, {method: "POST", body: "{}", headers: {"Content-Type": "application/json"}}],
        [`${url}/api/deployments/${deployment}`, {method: "PATCH", body: '{"pull_steps": []}'}],
        [`${url}/api/deployments/${deployment}/create_flow_run`, {method: "POST", body: "{}"}],
        [`${url}/api/deployments/${deployment}/create_flow_run`, {method: "POST", body: "{}", mode: "no-cors"}],
        [`${url}/api/deployments/${deployment}/create_flow_run`,
            {method: "POST", body: "{}", mode: "no-cors", credentials: "include"}],
        [`${url}/api/admin/database/clear`, {method: "POST", body: '{"confirm": true}', mode: "no-cors"}],
        [`${url}/ui-settings`, {}],
    ];
    const read = [];
    for (const [address, options] of tried) {
        try { read.push(await (await fetch(address, options)).text()); } catch (error) { read.push(""); }
    }
    const stream = new WebSocket(`${url.replace("http", "ws")}/api/events/out`, ["prefect"]);
    read.push(await new Promise(done => {
        stream.onopen = () => stream.send('{"type": "auth", "token": null}');
        stream.onmessage = event => done(event.data);
        stream.onclose = () => done("");
    }));
    const frame = document.createElement("iframe");
    frame.src = `${url}/deployments`;
    const loaded = new Promise(done => { frame.onload = done; });
    document.body.append(frame);
    await loaded;
    try { read.push(frame.contentDocument.body.innerText); } catch (error) { read.push(""); }
    return read;
}
"""


@pytest.mark.attack("a page of another origin in a browser that is logged in: nine ways to read or run something")
@pytest.mark.parametrize("origin", ["another", "a foreign name"])
def test_a_page_of_another_origin_reads_and_runs_nothing(page, url, tmp_path, origin):
    """In the same browser, which is logged in."""
    enter(page, url)
    api = f"{url}/api"
    (tmp_path / "evil.html").write_text("<body></body>")
    deployment = service.request(f"{api}/deployments/name/{service.FLOW}/variance")["id"]
    pull_steps, runs = f"{api}/deployments/{deployment}", f"{api}/flow_runs/count"
    before = service.request(pull_steps)["pull_steps"], service.request(runs, {})
    evil = page.context.new_page()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            evil.goto(f"http://{'127.0.0.1' if origin == 'another' else 'evil.example'}:{http.server_port}/evil.html")
            ours = url if origin == "another" else url.replace("127.0.0.1", "evil.example")
            read = evil.evaluate(ATTACK, {"url": ours, "deployment": deployment})
        finally:
            http.shutdown()
            thread.join()
    assert len(read) == 9 and set(read) == {""}
    assert (service.request(pull_steps)["pull_steps"], service.request(runs, {})) == before
    evil.goto(url.replace("127.0.0.1", "evil.example"))
    assert evil.inner_text("body") == "Invalid host header"  # and not the page that holds the key of another name
