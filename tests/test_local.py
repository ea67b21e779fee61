"""What the terminal says of a run's stages is what the server has on record, also where the stream lost some of it."""

from collections.abc import Callable
from typing import Any

import pytest

from flows import local

URL = "http://x/api"
FOUR = [("score", "Cached"), ("measure", "Completed"), ("variance", "Failed"), ("report", "Cached")]
ALL = [*FOUR, ("pages", "Running")]


def records(*looks: list[tuple[str, str | None]]) -> Callable[[str, Any], list[dict[str, Any]]]:
    """A server that knows these tasks, (name, state), at one look and those at the next; in pages of 2."""
    left = list(looks)
    types = {"Cached": "COMPLETED", None: None}

    def answer(url: str, body: Any) -> list[dict[str, Any]]:
        assert url == f"{URL}/task_runs/filter" and body["flow_runs"] == {"id": {"any_": ["run"]}}
        page = left[0][body["offset"] : body["offset"] + 2]
        if not page and len(left) > 1:
            left.pop(0)
        return [
            {"name": name, "state_name": state, "state_type": types.get(state, str(state).upper())}
            for name, state in page
        ]

    return answer


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_BETWEEN_LOOKS", 0.0)


def test_it_waits_until_the_server_has_noted_all_stages(monkeypatch: pytest.MonkeyPatch):
    done = [*FOUR, ("pages", "Completed")]
    unnoted = [("score", "Cached"), ("measure", None), ("variance", "Failed")]
    monkeypatch.setattr(local, "request", records([], [], [], unnoted, unnoted, ALL, ALL, done, done))
    assert local._lines_of_stages("run", URL, at_least=1) == [
        "  reused    score",
        "  computed  measure",
        "  failed    variance",
        "  reused    report",
        "  computed  pages",
    ]


def test_a_run_that_was_refused_before_any_stage_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "request", records([], [], FOUR))
    assert local._lines_of_stages("run", URL, at_least=0) == []


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "request", records(ALL))
    monkeypatch.setattr(local, "_NOTED_WITHIN", 0.2)
    assert "  failed    variance" in local._lines_of_stages("run", URL, at_least=1)


def test_a_run_that_was_not_made_has_no_stages():
    assert local._lines_of_stages("", URL, at_least=0) == []


def test_a_line_of_the_stream_and_one_of_the_record_are_the_same():
    event = "● 12:00:00 0123456789ab prefect.task-run.Cached * variance · step-60"
    assert local._for_reader(event) == local._line("Cached", "variance · step-60")
