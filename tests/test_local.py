"""What the terminal says of a run's stages is what the server has on record, also where the stream lost some of it."""

from collections.abc import Callable
from typing import Any

import pytest

from flows import local
from flows.stage_lines import not_told, recorded_lines

URL = "http://x/api"
FOUR = [("score · a", "Cached"), ("measure · a", "Completed"), ("variance · a", "Failed"), ("report · a", "Cached")]
ALL = [*FOUR, ("pages · a", "Running"), ("a", "Running")]  # the last is that of a checkpoint, around its stages


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
    done = [*FOUR, ("pages · a", "Completed"), ("a", "Completed")]
    unnoted = [("score · a", "Cached"), ("measure · a", None), ("variance · a", "Failed")]
    monkeypatch.setattr(local, "request", records([], [], [], unnoted, unnoted, ALL, ALL, done, done))
    assert local._stages("run", URL, at_least=1) == [
        ("reused", "score · a"),
        ("computed", "measure · a"),
        ("failed", "variance · a"),
        ("reused", "report · a"),
        ("computed", "pages · a"),
    ]


def test_a_run_that_was_refused_before_any_stage_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "request", records([], [], FOUR))
    assert local._stages("run", URL, at_least=0) == []


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "request", records(ALL))
    monkeypatch.setattr(local, "_NOTED_WITHIN", 0.2)
    assert ("failed", "variance · a") in local._stages("run", URL, at_least=1)


def test_a_run_that_was_not_made_has_no_stages():
    assert local._stages("", URL, at_least=0) == []


def event(state: str, name: str) -> str:
    return f"● 12:00:00 0123456789ab prefect.task-run.{state} * {name}"


def test_of_the_stream_only_what_fails_is_told_at_once_as_the_record_says_it():
    failed = local._for_reader(event("Failed", "variance · step-60"))
    assert [failed.strip()] == recorded_lines([("failed", "variance · step-60")])
    assert local._for_reader(event("AwaitingRetry", "score · a")) == "  will be tried again score · a"
    assert local._for_reader(event("Completed", "score · a")) == local._for_reader(event("Cached", "score · a")) == ""
    assert local._for_reader(event("Failed", "step-60")) == "", "a stage of it has failed, and is told"
    assert local._for_reader("▪ 12:00:00 0123456789ab computed  score · a  (3 s)") == "  computed  score · a  (3 s)"
    assert local._for_reader("▪ 12:00:00 0123456789ab The result:") == ""  # which is printed from the run's folder


def test_the_record_is_told_in_a_line_for_all_shards_and_one_for_what_was_reused():
    shards = [("computed", f"score · step-60 · shard {i}/3") for i in (1, 2, 3)]
    ended = [("reused", "load · step-60"), *shards, ("reused", "draw · a · draw 1/2"), ("failed", "report · run")]
    assert recorded_lines(ended) == [
        "computed  score · step-60  (3 parts)",
        "failed    report · run",
        "reused    2 stage runs: load, draw",
    ]


def test_what_the_stream_lost_is_told_from_the_record_and_nothing_twice():
    recorded = ["computed  score · a  (3 parts)", "computed  report · run", "reused    3 stage runs: load, draw"]
    told = ["  computed  score · a  (3 parts, 12 s)", "  reused    2 stage runs: load", "  reused    1 stage run: draw"]
    assert not_told(recorded, told) == ["computed  report · run"]
    assert not_told(recorded, told[:2]) == ["computed  report · run", "reused    3 stage runs: load, draw"]
    assert not_told(recorded, []) == recorded
