"""Prefect's states over a real server: what is Completed, what is Cached, what is tried again, what a failure says."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from uuid import UUID

import pytest
from bad_configs import BAD, FAILED, REFUSED
from bad_configs import config_of as bad_config
from pipeline_fixtures import NAMES, make_run, values
from prefect import flow, get_client, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import Pause, PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from prefect.states import Suspended
from prefect.testing.utilities import prefect_test_harness

from entropy_core.config.paths import Origin
from entropy_core.config.read import parse_config
from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import ConfigError, ProbeError
from entropy_core.estimates.tables import RESULTS
from entropy_core.execution import Execution
from entropy_core.files.digests import file_digest
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.threads import Threads
from entropy_core.policy.spec import PolicySpec
from entropy_core.report.recorded_run import load_run
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from entropy_core.workers.choice import Workers
from flows.entropy_probe import checkpoint_sweep, variance
from flows.plan import plan_table
from flows.results import inline_figures, terminal_table
from flows.serve import deployments
from flows.service import FLOW
from tasks import stages
from tasks.device import device_slot

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
    raise ConfigError("E has 3 sequences", cause="a small pool", fix="take more")


def stumble(out, execution):
    CALLS.append("stumble")
    if len(CALLS) == 1:
        raise ConnectionResetError("the file server went away")
    return {}


def weigh(out, execution, *, policy):
    CALLS.append(f"weigh {policy.weights}")
    return {"weights": policy.weights}


def of(weights: str) -> dict[str, PolicySpec]:
    spec = PolicySpec(weights=weights, dtype="float32", attn_implementation="eager", temperature=1.0)
    return {"policy": spec}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
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


def test_what_is_cached_does_not_wait_for_the_device(store, tmp_path, monkeypatch):
    """Another run holds the GPU all the while."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tasks.device.device_name", lambda device, number: "a-gpu")
    monkeypatch.setattr("entropy_core.pipeline.rehearsal.is_rehearsed", lambda policy: True)  # there is no policy
    held: list[Artifact] = []
    with ThreadPoolExecutor(1) as pool, device_slot("a-gpu"):
        store.run(Stage("weigh", weigh), Execution(), of("a"))

        @flow
        def weighing(weights: str):
            return stages.prefect_runner(store, Execution())(Stage("weigh", weigh), of(weights), "one")

        held.append(weighing("a"))
        other = pool.submit(weighing, "b")
        time.sleep(2)
        assert CALLS == ["weigh a"] and not other.done()
    assert other.result(timeout=30) != held[0] and CALLS == ["weigh a", "weigh b"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(damage, name) for name in ("numbers.bin", "manifest.json") for damage in (Path.unlink, _truncate, _flip)],
)
def test_a_damaged_artifact_is_computed_again(store, damage: Callable[[Path], None], name):
    draw_and_add(store)
    (artifact,) = (artifact for artifact in store.ls() if artifact.stage == "draw")
    damage(artifact.directory / name)
    if (damage, name) == (_flip, "numbers.bin"):  # which shows when the file is opened, and here nobody does
        assert draw_and_add(store) == {"draw": "Cached", "add": "Cached"}
        assert store.check("draw", artifact.key, file_digest) == (
            None,
            "numbers.bin was altered: its SHA-256 is another",
        )
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
    assert (raised.value.fact, raised.value.fix) == ("E has 3 sequences", "take more")
    assert CALLS == ["refuse"]
    assert not [path for path in store.root.rglob("*") if path.is_file() and path.parent.name != ".locks"]


def of_part(store: Store, ids: list, last: Callable[[stages.Runner], object]) -> Callable[[], object]:
    """A flow that runs two stages as one part, the second by `last`."""

    @flow
    def in_part():
        ids.append(runtime.flow_run.id)
        run = stages.prefect_runner(store, None)

        def work() -> object:
            run(Stage("draw", draw), {"seed": 1}, "checkpoint-20")
            return last(run)

        return run.part("checkpoint-20", work)

    return in_part


def pause(run: stages.Runner) -> None:
    raise Pause(state=Suspended())


@pytest.mark.parametrize(
    ("last", "raised", "part"),
    [
        (lambda run: run(Stage("stumble", stumble), {}, "checkpoint-20"), None, "Completed"),
        (lambda run: run(Stage("refuse", refuse), {}, "checkpoint-20"), ConfigError, "Failed"),
        (pause, Pause, "Suspended"),
    ],
)
def test_a_part_is_a_task_run_around_those_of_its_stages_which_stay_as_they_ended(store, last, raised, part):
    ids: list = []
    with pytest.raises(raised) if raised else nullcontext():
        of_part(store, ids, last)()
    of_flow = FlowRunFilter(id=FlowRunFilterId(any_=ids))

    def ended(client: SyncPrefectClient) -> list[TaskRun]:
        runs = client.read_task_runs(flow_run_filter=of_flow)
        return [run for run in runs if run.state and (run.state.is_final() or run.name == "checkpoint-20")]

    eventually(ended, 2 if raised is Pause else 3)
    time.sleep(1)  # what would be taken back would be so now
    with get_client(sync_client=True) as client:
        runs = {run.name: run for run in ended(client)}
    states = {name: run.state.name for name, run in runs.items() if run.state}
    assert states.pop("checkpoint-20") == part and states.pop("draw · checkpoint-20") == "Completed"
    assert set(states.values()) <= {part}
    parents = [of.id for name in runs if " · " in name for of in runs[name].task_inputs["__parents__"]]
    assert set(parents) == {runs["checkpoint-20"].id} and len(parents) == len(runs) - 1


def eventually(ask: Callable[[SyncPrefectClient], list], count: int) -> list:
    """What the server says once it knows of so many; it learns of task runs and artifacts a moment later."""
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while len(found := ask(client)) < count and time.monotonic() < deadline:
            time.sleep(0.1)
    return found


def completed_task_runs(flow_run_id: UUID, count: int) -> list[TaskRun]:
    of_flow = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))

    def ask(client: SyncPrefectClient) -> list[TaskRun]:
        return [run for run in client.read_task_runs(flow_run_filter=of_flow) if run.state and run.state.is_completed()]

    return eventually(ask, count)


def test_task_runs_are_named_after_stage_and_label_and_linked(store):
    ids = []

    @flow
    def linked():
        ids.append(runtime.flow_run.id)
        run = stages.prefect_runner(store, None)
        drawn = run(Stage("draw", draw), {"seed": 1}, "checkpoint-20 · shard 1/2")
        assert run(Stage("add", add), {"draws": [drawn]}, "checkpoint-20").summary == {"total": sum(range(1, 101))}

    linked()
    runs = {run.name: run for run in completed_task_runs(ids[0], 2)}
    first, second = runs["draw · checkpoint-20 · shard 1/2"], runs["add · checkpoint-20"]
    assert [source.id for source in second.task_inputs["inputs"]] == [first.id]


def test_stages_in_workers_are_task_runs_of_the_same_flow(store):
    """Which wait for their workers in threads, and ask the cache there."""
    ids: list[UUID] = []
    both = Barrier(2, timeout=60)

    def compute(store: Store, stage: Stage, execution: None, inputs: dict) -> Artifact:
        both.wait()
        return store.run(stage, execution, inputs)

    @flow
    def beside():
        ids.append(runtime.flow_run.id)
        run = stages.prefect_runner(store, None, Workers(compute, Threads(2)))
        return run.map(Stage("draw", draw), [{"seed": 1}, {"seed": 2}], ["one", "two"])

    assert beside() == beside()
    assert {run.name: run.state.name for run in completed_task_runs(ids[0], 2)} == dict.fromkeys(NAMED, "Completed")
    assert {run.name: run.state.name for run in completed_task_runs(ids[1], 2)} == dict.fromkeys(NAMED, "Cached")


NAMED = ("draw · one", "draw · two")


def test_a_sweep_runs_as_many_stages_as_announced_and_shows_its_results(tmp_path):
    config = parse_config(values(make_run(tmp_path / "run"), tmp_path / "artifacts"))
    steps = plan(config, preflight(config), Store(config.store_root))
    state = checkpoint_sweep(config, return_state=True)
    result = state.result()
    assert state.message == f"Results in {result.run_directory}"

    around = [*NAMES, "plan", "results"]
    runs = completed_task_runs(state.state_details.flow_run_id, len(steps) + len(around))
    assert Counter(run.name for run in runs) == Counter([*(f"{step.stage} · {step.label}" for step in steps), *around])
    assert {run.state.name for run in runs} == {"Completed"}

    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    artifacts = eventually(lambda client: client.read_artifacts(artifact_filter=of_run), 6)
    assert [artifact.key for artifact in artifacts if not artifact.task_run_id] == ["tiny-summary"]
    shown = {artifact.key.removeprefix("tiny-"): artifact.data for artifact in artifacts}
    assert shown["progress"] == 100
    assert [row["stage"] for row in json.loads(shown["plan"])] == [row["stage"] for row in plan_table(steps, {})]
    results = result.report.table("results.parquet").to_pylist()
    for name in NAMES:
        of = [row for row in results if (row["checkpoint"], row["normalization"]) == (name, "per_token")]
        cells = json.loads(shown[f"results-{name}"])
        assert [row["η / lr"] for row in cells] == [row["eta_over_lr"] for row in of]
        assert [row["verdict"] for row in cells] == [row["verdict"] for row in of]
        assert cells and all(24 * len(row) + 8 * sum(len(str(cell)) for cell in row.values()) <= 720 for row in cells)
    assert "](data:image/png;base64," in shown["report"]
    assert ".png)" not in shown["report"]
    assert {f"Files: `{result.run_directory}`"} == {a.description for a in artifacts if a.key == "tiny-report"}
    address = (result.run_directory / "flow-run.txt").read_text().splitlines()[0]
    assert address.endswith(f"/flow-run/{state.state_details.flow_run_id}")

    run = load_run(result.run_id, config.store_root)
    assert [line.split(" | ")[0] for line in shown["summary"].splitlines() if line.startswith("| checkpoint-")] == [
        f"| {name}" for name in NAMES
    ]
    listed = re.findall(r"^\| `(.*?)` \|", shown["summary"], re.MULTILINE)
    assert {f"tiny-{key}" for key in shown} == {*listed, "tiny-summary", "tiny-plan", "tiny-progress"}
    [about] = [artifact.description for artifact in artifacts if artifact.key == "tiny-summary"]
    assert about.endswith(run.answer) and about.count("> **Warning:** ") == len(run.warnings)
    with get_client(sync_client=True) as client:
        introduced = client.read_flow_run(state.state_details.flow_run_id)
    assert introduced.name == f"tiny · {', '.join(NAMES)}" and set(introduced.tags) == {"sweep", "tiny", *NAMES}

    again = variance(
        VarianceRequest(run=result.run_id, artifacts=str(tmp_path / "artifacts"), confidence_level=0.5),
        return_state=True,
    )
    with get_client(sync_client=True) as client:
        introduced = client.read_flow_run(again.state_details.flow_run_id)
    assert introduced.name == f"{result.run_id} · variance"
    rows = again.result().report.table("results.parquet").to_pylist()
    assert {row["confidence_level"] for row in rows} == {0.5}


def test_a_request_that_cannot_be_met_fails_with_one_line(tmp_path, caplog):
    config = parse_config({"checkpoints": [str(tmp_path / "nowhere-*")]})
    state = checkpoint_sweep(config, return_state=True)
    assert state.is_failed()
    assert "nowhere-*" in state.message
    assert "\n" not in state.message
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(state.state_details.flow_run_id).name == "probe · nowhere-*"
    assert "Encountered exception" in caplog.text
    assert "Traceback" not in caplog.text


def test_both_flows_share_the_name_that_their_deployments_are_called_by():
    assert {checkpoint_sweep.name, variance.name} == {FLOW}


def test_figures_are_put_into_the_page(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    page = inline_figures("![one](a.png) [kept](a.png) ![far](https://x/a.png)", tmp_path.joinpath)
    assert page == "![one](data:image/png;base64,YWJj) [kept](a.png) ![far](https://x/a.png)"


def test_the_terminal_shows_one_normalization_and_rounds():
    row = dict.fromkeys(RESULTS.names, 0.123456) | {
        "checkpoint": "checkpoint-8",
        "verdict": "resolved",
        "second_order": "resolved",
        "delta_h12_next_update_low": math.nan,
    }
    row |= {"normalization": "per_token", "estimator": "snis"}
    lines = terminal_table([row, row | {"normalization": "per_sequence"}]).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["checkpoint-8", "0.1235", "0.1235", "0.1235"]
    assert "–" in lines[1]
    assert lines[2] == "(per_token, snis; 1 of 2 rows)"


def test_what_a_form_posts_is_refused_or_fails_with_the_reason(tmp_path, caplog):
    """What the form's schema can say is refused by the server and makes no run. The rest makes a run that fails before
    any stage, and its state, which the UI shows, gives the reason on one line.
    """
    make_run(tmp_path / "run")
    with get_client(sync_client=True) as client:
        deployment_id = deployments(None)[0].apply()
        for name, bad in BAD.items():
            config = bad_config(tmp_path, bad.change)
            if isinstance(config.get("update", {}).get("reward"), str):  # a form has a list
                config["update"]["reward"] = [config["update"]["reward"]]
            parameters = {"config": config}
            if name in REFUSED:
                with pytest.raises(PrefectHTTPStatusError) as refused:
                    client.create_flow_run_from_deployment(deployment_id, parameters=parameters)
                assert refused.value.response.status_code in (409, 422), name
                assert re.search(bad.said, refused.value.response.json()["detail"]), name
                continue
            flow_run = client.create_flow_run_from_deployment(deployment_id, parameters=parameters)
            run_flow(checkpoint_sweep, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
            state = client.read_flow_run(flow_run.id).state
            assert state and state.is_failed(), name
            assert re.search(bad.said, state.message) and "\n" not in state.message, name
            with pytest.raises(ProbeError) as raised:
                preflight(parse_config(parameters["config"], origin=Origin(Path.cwd(), must_exist=True)))
            assert state.message.endswith(str(raised.value)), name
        of_the_form = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
        assert len(client.read_flow_runs(flow_run_filter=of_the_form)) == len(FAILED)
        assert client.read_task_runs(flow_run_filter=of_the_form) == []
    assert "Traceback" not in caplog.text
    assert not (tmp_path / "artifacts").exists()
