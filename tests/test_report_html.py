"""The page to share: it says what the markdown says, loads nothing, and runs nothing that a run's files bring."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from entropy_core.report import html

TITLE = "<script>alert(1)</script>"
MARKDOWN = f"""# {TITLE}: what one step does

> **Warning:** [a link](https://evil.example/) and <img src=https://evil.example/x.png onerror=alert(1)>

![the figure](prediction.png) ![theirs](https://evil.example/y.png) <https://evil.example/>

| checkpoint | δH₁ | the next update |
|---|---:|---:|
| checkpoint-10 | −0.5 | [−0.7, −0.3] |
| checkpoint-9 | +0.25 | – |
| `ab"onmouseover=alert(1)` | +1e-3 | [−0.1, +0.1] |
"""
FIGURES = {"prediction": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"}


def token(sequence: int, position: int, text: str, share: float) -> dict[str, Any]:
    return {
        "sequence_id": sequence,
        "position": position,
        "text": text,
        "coefficient": 0.5,
        "sensitivity_per_token": 2 * share,
        "share_per_token": share,
    }


def sequence(which: int, prompt: str) -> dict[str, Any]:
    return {"sequence_id": which, "prompt": prompt, "reward": 1.0 if which else None, "advantage": 0.5 - which}


SEQUENCES = [sequence(0, '1+1="'), sequence(1, "</code><script>alert(2)</script>"), sequence(2, "empty")]
TOKENS = [token(0, 0, "2", 0.01), token(1, 0, "</span>", -0.5), token(1, 1, '"\n\u202e', 0.25)]


def page() -> str:
    responses = html.responses("<b>", TOKENS, SEQUENCES, "share_per_token", "nats per token")
    return html.html(TITLE, MARKDOWN, FIGURES, responses)


class Elements(HTMLParser):
    """All elements and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_nothing_in_it_is_fetched_and_only_its_own_script_runs():
    elements = Elements(page())
    names = [name for name, _ in elements.found]
    assert names.count("script") == names.count("style") == names.count("img") == 1
    assert not {"a", "link", "iframe", "object", "form", "b"} & set(names)
    for name, attributes in elements.found:
        assert not {"href", "onerror", "onmouseover", "srcset"} & set(attributes), (name, attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    policy = next(a["content"] for name, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    [script] = re.findall("<script>(.*?)</script>", page(), re.DOTALL)
    assert policy and policy.startswith("default-src 'none'")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_it_shows_what_the_markdown_and_the_tables_hold_as_text():
    elements = Elements(page())
    text = "".join(elements.texts)
    for said in (TITLE, "what one step does", "[a link](https://evil.example/)", "[−0.7, −0.3]", "theirs"):
        assert said in text
    assert base64.b64encode(FIGURES["prediction"]).decode() in page()
    assert "</code><script>alert(2)</script> reward 1, advantage -0.5, share -0.25" in text.replace("</code> ", "")
    figures = [a["data-figures"] for _, a in elements.found if "data-figures" in a]
    assert "'</span>', token 1: share -0.5, sensitivity -1, coefficient +0.5" in figures


def test_the_response_with_the_largest_shares_comes_first_and_the_number_shown_is_said():
    assert page().index("alert(2)") < page().index("1+1=")
    many = [sequence(which, f"prompt {which}") for which in range(html.MOST_SEQUENCES + 5)]
    shown = html.responses("x", [token(64, 0, "a", 1.0)], many, "share_per_token", "nats")
    assert (
        f"{html.MOST_SEQUENCES} of {len(many)} responses" in shown and shown.count("<details>") == html.MOST_SEQUENCES
    )
    assert shown.index("prompt 64<") < shown.index("prompt 0<")


@pytest.fixture(params=["light", "dark"])
def browser_page(request, tmp_path: Path) -> Iterator[Any]:
    from test_ui import chromium

    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError, reason="`make test-ui` installs it")
    (tmp_path / "report.html").write_text(page(), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = chrome.new_context(offline=True, color_scheme=request.param, viewport={"width": 1280, "height": 800})
        opened = context.new_page()
        trouble: list[str] = []
        opened.on("dialog", lambda dialog: trouble.append(dialog.message))
        opened.on("pageerror", lambda error: trouble.append(str(error)))
        opened.on("request", lambda asked: trouble.append(asked.url) if asked.url.startswith("http") else None)
        opened.goto((tmp_path / "report.html").as_uri())
        yield opened
        assert trouble == []
        chrome.close()


@pytest.mark.ui
def test_a_table_is_sorted_by_a_click(browser_page):
    def column(which: int) -> list[str]:
        return browser_page.locator(f"tbody tr td:nth-child({which})").all_text_contents()

    head = browser_page.locator("th")
    head.nth(1).click()
    assert column(2) == ["−0.5", "+1e-3", "+0.25"]
    head.nth(1).click()
    assert column(2) == ["+0.25", "+1e-3", "−0.5"]
    head.nth(2).click()
    assert column(3) == ["[−0.7, −0.3]", "[−0.1, +0.1]", "–"]  # what has no figure is last, whatever the order
    head.nth(2).press("Enter")
    assert column(3) == ["[−0.1, +0.1]", "[−0.7, −0.3]", "–"]
    head.nth(0).click()
    assert column(1)[-2:] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.ui
def test_a_token_says_its_figures_when_clicked(browser_page):
    browser_page.locator("summary").first.click()
    browser_page.locator("details .token").nth(1).click()
    assert "share +0.25" in browser_page.locator("#figures").inner_text()
    paper = browser_page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper in ("rgb(255, 255, 255)", "rgb(22, 25, 29)")
