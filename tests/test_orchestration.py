"""Prefect's states over a real server: what is Completed, what is Cached, what is tried again, what a failure says."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.testing.utilities import prefect_test_harness

from entropy_core.artifact import Artifact
from entropy_core.errors import ConfigError
from entropy_core.store import Stage, Store
from tasks import stages

CALLS: list[str] = []


def draw(out, execution, *, seed):
    CALLS.append("draw")
    time.sleep(execution or 0)
    out.path("numbers.bin").write_bytes(bytes(range(seed, seed + 100)))
    return {"seed": seed}


def add(out, execution, *, draws):
    CALLS.append("add")
    total = sum(sum(draw.path("numbers.bin").read_bytes()) for draw in draws)
    out.json({"total": total}, "total.json")
    return {"total": total}


def refuse(out, execution):
    CALLS.append("refuse")
    raise ConfigError("E has 3 sequences", cause="a small pool", way_out="take more")


def stumble(out, execution):
    CALLS.append("stumble")
    if len(CALLS) == 1:
        raise ConnectionResetError("the file server went away")
    return {}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=60):
        yield


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(stages, "RETRY_DELAYS", [0.0, 0.0])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@flow
def draw_and_add(store: Store, seconds: float = 0) -> dict[str, str]:
    """Two stages, one on the other's artifact; returns the name of the state that each ended in."""
    states = {}

    def run(stage: Stage, **inputs) -> Artifact:
        state = stages.stage_task(stage, store, seconds)(inputs=inputs, label="one · shard 1/2", return_state=True)
        states[stage.name] = state.name
        return state.result()

    run(Stage("add", add), draws=[run(Stage("draw", draw), seed=1)])
    return states


def test_an_artifact_is_computed_once_and_then_cached(store):
    assert draw_and_add(store) == {"draw": "Completed", "add": "Completed"}
    assert draw_and_add(store) == {"draw": "Cached", "add": "Cached"}
    assert CALLS == ["draw", "add"]


def test_what_was_computed_without_prefect_is_cached(store):
    store.run(Stage("draw", draw), None, {"seed": 1})
    assert draw_and_add(store) == {"draw": "Cached", "add": "Completed"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["numbers.bin", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _flip])
def test_a_damaged_artifact_is_computed_again(store, damage: Callable[[Path], None], name):
    draw_and_add(store)
    (artifact,) = (artifact for artifact in store.ls() if artifact.stage == "draw")
    damage(artifact.directory / name)
    assert draw_and_add(store) == {"draw": "Completed", "add": "Cached"}
    assert draw_and_add(store) == {"draw": "Cached", "add": "Cached"}


def test_a_moved_store_is_still_cached(store, tmp_path):
    draw_and_add(store)
    moved = store.root.rename(tmp_path / "elsewhere")
    assert draw_and_add(Store(moved)) == {"draw": "Cached", "add": "Cached"}
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in moved.rglob("*") if path.is_file())


def test_two_runs_on_one_key_compute_once(store):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: draw_and_add(store, seconds=1.0), range(2)))
    assert CALLS == ["draw", "add"]
    assert all(states.keys() == {"draw", "add"} for states in both)


def test_an_error_of_the_operating_system_is_tried_again(store):
    @flow
    def stumbling():
        stages.prefect_runner(store, None)(Stage("stumble", stumble), {}, "one")

    stumbling()
    assert CALLS == ["stumble", "stumble"]


def test_a_probe_error_is_not_tried_again_and_passes_through(store):
    @flow
    def refusing():
        stages.prefect_runner(store, None)(Stage("refuse", refuse), {}, "one")

    with pytest.raises(ConfigError) as raised:
        refusing()
    assert (raised.value.fact, raised.value.way_out) == ("E has 3 sequences", "take more")
    assert CALLS == ["refuse"]
    assert not [path for path in store.root.rglob("*") if path.is_file() and path.parent.name != ".locks"]


def test_task_runs_are_named_after_stage_and_label_and_linked(store):
    ids = []

    @flow
    def linked():
        ids.append(FlowRunContext.get().flow_run.id)
        run = stages.prefect_runner(store, None)
        drawn = run(Stage("draw", draw), {"seed": 1}, "checkpoint-20 · shard 1/2")
        assert run(Stage("add", add), {"draws": [drawn]}, "checkpoint-20").summary == {"total": sum(range(1, 101))}

    linked()
    runs = {}
    deadline = time.monotonic() + 30
    while len(runs) < 2 and time.monotonic() < deadline:  # the server learns of task runs a moment later
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)))
        runs = {run.name: run for run in found if run.state_name == "Completed"}
        time.sleep(0.1)
    first, second = runs["draw · checkpoint-20 · shard 1/2"], runs["add · checkpoint-20"]
    assert [source.id for source in second.task_inputs["inputs"]] == [first.id]
