"""The plan of a sweep: what it calls cached is reused, what it says would run is computed, and it touches nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_fixtures import NAMES, make_run, probe, skip_figures, values, write_reward

from entropy_core.config.read import parse_config
from entropy_core.pipeline.plan import Cost, Step, plan, typical_costs
from entropy_core.pipeline.preflight import preflight
from entropy_core.store.store import Stage, Store
from flows.cli import main
from flows.plan import plan_table, plan_total
from flows.results import duration, size

FIRST, SECOND = NAMES
AFTER = {"variance", "report"}
WHOLE_BATCH = {"entropy-gradient", "first-order-u", "half-steps-u", "rescore-e-batch", "agreement"} | AFTER


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A run, of which the first checkpoint was probed."""
    folder = tmp_path_factory.mktemp("origin")
    make_run(folder / "run")
    reward = write_reward(folder)
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        probe(of(folder, folder, reward))
    return folder


def of(run: Path, store: Path, reward: str, **sections: Any) -> dict[str, Any]:
    least: dict[str, Any] = {"checkpoints": [str(run / "run" / FIRST)], "update": {"reward": reward}}
    return values(run / "run", store / "artifacts", **least | sections)


@pytest.fixture
def home(origin, tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    shutil.copytree(origin / "artifacts", tmp_path / "artifacts")
    return tmp_path


def config_of(origin: Path, home: Path, **sections: Any) -> dict[str, Any]:
    return of(origin, home, f"{origin / 'reward.py'}:share_of_low_digits", **sections)


def planned(config: dict[str, Any]) -> list[Step]:
    parsed = parse_config(config)
    return plan(parsed, preflight(parsed), Store(parsed.store_root))


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the same": ({}, set()),
    "a confidence level": ({"variance": {"confidence_level": 0.9}}, AFTER),
    "a step size": ({"importance": {"etas": [0, 1, 2]}}, {"importance"} | AFTER),
    "more sequences": (
        {"batch_config": {"E_total_sequences": 24}},
        {"sample-e-batch", "score-e-batch", "first-order-e", "importance"} | WHOLE_BATCH,
    ),
    "fewer sequences": ({"batch_config": {"E_total_sequences": 8}}, WHOLE_BATCH),
    "the other checkpoint, too": (
        {"checkpoints": "both"},
        {"load-checkpoint", "sample-e-batch", "score-e-batch", "sample-u-batch", "score-u-batch", "reward-u-batch"}
        | {"compute-update", "first-order-e", "importance", "discriminate-u"}
        | WHOLE_BATCH,
    ),
}


@pytest.mark.parametrize(("change", "stages"), CASES.values(), ids=CASES)
def test_what_would_run_is_computed_and_nothing_else(origin, home, change, stages):
    if "checkpoints" in change:
        change = {"checkpoints": [str(origin / "run" / name) for name in NAMES]}
    config = config_of(origin, home, **change)
    before = sorted(home.rglob("*"))
    steps = planned(config)
    assert sorted(home.rglob("*")) == before

    to_run = [step.stage for step in steps if not step.cached]
    assert set(to_run) == stages
    assert all(bool(step.reasons) != step.cached for step in steps)
    done = probe(config)
    assert [name for name, _, _ in done.run.asked] == [step.stage for step in steps]
    assert done.run.was_computed == {stage: to_run.count(stage) for stage in stages}
    assert {step.cached for step in planned(config)} == {True}


def test_only_the_new_shards_and_the_new_step_sizes_would_run(origin, home):
    rows = plan_table(planned(config_of(origin, home, batch_config={"E_total_sequences": 32})), {})
    sampled = next(row for row in rows if row["stage"] == "sample-e-batch")
    assert (sampled["of"], sampled["cached"], sampled["would run"], sampled["parts"]) == (FIRST, 2, 2, "3–4 of 4")
    rows = plan_table(planned(config_of(origin, home, importance={"etas": [0, 1, 2]})), {})
    assert {row["of"]: row["would run"] for row in rows if row["stage"] == "importance"} == {
        f"{FIRST} · η=1 lr": 0,
        f"{FIRST} · η=2 lr": 2,
    }


def test_the_reason_is_the_setting_that_changed(origin, home):
    steps = planned(config_of(origin, home, variance={"confidence_level": 0.9}))
    variance, report = (step for step in steps if not step.cached)
    assert variance.reasons == ("inputs.confidence_level: 0.95 → 0.9 (variance)",)
    assert report.reasons == ("variance would run",)


def work(out, execution, *, count):
    out.path("data").write_bytes(bytes(count))
    return {}


def test_costs_are_the_medians_of_the_store(tmp_path):
    store = Store(tmp_path)
    assert typical_costs(store) == {}
    for count in (10, 20, 90):
        store.run(Stage("work", work), None, {"count": count})
    seconds = sorted(artifact.manifest["wall_seconds"] for artifact in store.ls())
    assert typical_costs(store) == {"work": Cost(seconds[1], 20)}


STEPS = [
    Step("sample", "checkpoint-5 · shard 1/4", True, ()),
    *(Step("sample", f"checkpoint-5 · shard {i}/4", False, ("new",)) for i in (2, 3, 4)),
    Step("sample", "checkpoint-7 · shard 2/4", False, ("a", "b", "c", "d")),
    Step("sample", "checkpoint-7 · shard 4/4", False, ("a",)),
    Step("report", "probe", False, ("sample would run",)),
]
COSTS = {"sample": Cost(40.0, 2e6)}


def test_a_row_has_all_shards_of_one_thing():
    assert plan_table(STEPS, COSTS) == [
        {"stage": "sample", "of": "checkpoint-5", "cached": 1, "would run": 3, "parts": "2–4 of 4"}
        | {"time": "2 min", "disk": "6 MB", "why": "new"},
        {"stage": "sample", "of": "checkpoint-7", "cached": 0, "would run": 2, "parts": "2, 4 of 4"}
        | {"time": "80 s", "disk": "4 MB", "why": "a; b; and 2 more"},
        {"stage": "report", "of": "probe", "cached": 0, "would run": 1, "parts": ""}
        | {"time": "", "disk": "", "why": "sample would run"},
    ]
    assert plan_total(STEPS, COSTS) == (
        "1 of 7 stage runs are cached, 6 would run: at most 3 min and 10 MB, if they are like those in the store; "
        "never run here before, so not counted: report"
    )
    assert plan_total(STEPS[:1], COSTS) == "1 of 1 stage runs are cached, 0 would run"


def test_times_and_sizes_are_in_units_that_suit_them():
    assert [duration(s) for s in (0, 0.26, 9.94, 12, 100, 5400)] == ["0 s", "0.3 s", "9.9 s", "12 s", "2 min", "1.5 h"]
    assert [size(b) for b in (0, 512, 62_000, 1.5e6, 2.25e9)] == ["0 kB", "0.512 kB", "62 kB", "1.5 MB", "2.25 GB"]


def test_the_command_prints_the_plan(origin, home, capsys):
    path = home / "probe.yaml"
    path.write_text(yaml.safe_dump(config_of(origin, home, variance={"confidence_level": 0.9})))
    assert main(["plan", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "of", "cached", "would", "run", "parts", "time", "disk", "why"]
    (variance,) = (line for line in lines if line.split()[:1] == ["variance"])
    assert variance.endswith("inputs.confidence_level: 0.95 → 0.9 (variance)")
    assert " would run: at most " in lines[-1]

    path.write_text("checkpoints: []")
    assert main(["plan", str(path)]) == 2
    assert "checkpoints: " in capsys.readouterr().err
