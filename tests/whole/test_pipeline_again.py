"""The statistics of a sweep again, without what it was made from; and sweeps in other modes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pipeline_fixtures import (
    LEARNING_RATE,
    NAMES,
    Counting,
    Probe,
    probe,
    skip_figures,
)
from swept_fixtures import by_eta, config_of

from entropy_core.code.version import code_version
from entropy_core.config.read import load_config, parse_config
from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import CheckpointError, ConfigError, StoreError
from entropy_core.execution import Execution
from entropy_core.files.digests import file_digest
from entropy_core.pipeline import statistics
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.preflight import preflight
from entropy_core.store import runs
from entropy_core.store.store import Store

pytest_plugins = ["swept_fixtures"]


@pytest.fixture(scope="module")
def home(swept) -> Path:
    return swept.home


@pytest.fixture(scope="module")
def first(swept) -> Probe:
    return swept.first


@pytest.fixture
def away(home, tmp_path) -> Path:
    """A copy of everything, to change."""
    return shutil.copytree(home, tmp_path / "away")


@pytest.fixture(autouse=True)
def _without_figures(first, monkeypatch):
    skip_figures(monkeypatch)


@pytest.fixture
def redo(away):
    """The sweep again with some settings changed: how often each stage was computed."""

    def run(**sections: Any) -> Probe:
        return probe(config_of(away, **sections))

    return run


# --- the statistics again --------------------------------------------------------------------------------------------


@pytest.fixture
def again(away, without_model):
    """The variance flow on a store whose checkpoints, reward and run folder are gone."""
    shutil.rmtree(away / "run")
    (away / "reward.py").unlink()

    def run(**request: Any) -> tuple[Counting, pipeline.SweepResult]:
        store = Store(away / "artifacts")
        counting = Counting(store, Execution())
        request = VarianceRequest(artifacts=str(away / "artifacts"), **request)
        return counting, statistics.variance(request, store, counting)

    return run


def test_another_confidence_level_needs_neither_model_nor_checkpoint(again, first):
    counting, result = again(confidence_level=0.5)
    assert counting.was_computed == {"variance": len(NAMES), "report": 1}
    assert {stage for stage, _, _ in counting.asked} == {"variance", "agreement", "report"}
    rows = result.report.table("results.parquet").to_pylist()
    for row, before in zip(rows, first.rows, strict=True):
        assert row["confidence_level"] == 0.5
        for name in ("H", "delta_h1", "delta_h", "se_given_u", "se_over_u"):
            assert row[name] == before[name]
        if row["eta"]:
            for name in ("this_update", "delta_h_this_update"):
                assert row[f"{name}_high"] - row[f"{name}_low"] < before[f"{name}_high"] - before[f"{name}_low"]
    assert result.run_id != first.result.run_id
    assert load_config(result.run_directory / "config.yaml").variance.confidence_level == 0.5


def test_a_request_for_nothing_new_is_the_same_run(again, first):
    counting, result = again()
    assert counting.was_computed == {}
    assert result.run_id == first.result.run_id


def test_one_normalization_and_clusters_of_prompts(again):
    counting, result = again(normalizations=["per_sequence"], cluster="prompt", baseline="none")
    assert counting.was_computed == {"variance": len(NAMES), "report": 1}
    rows = result.report.table("results.parquet").to_pylist()
    assert {row["normalization"] for row in rows} == {"per_sequence"}


def test_the_latest_is_the_last_sweep_and_a_rerun_of_a_rerun_is_named(again, first):
    _, other = again(confidence_level=0.5)
    _, of_sweep = again(baseline="none")
    _, of_rerun = again(run=other.run_id, baseline="none")
    settings = [load_config(result.run_directory / "config.yaml").variance for result in (of_sweep, of_rerun)]
    assert [(of.confidence_level, of.baseline) for of in settings] == [(0.95, "none"), (0.5, "none")]
    root = other.run_directory.parents[1]
    parents = {run_id: runs.rerun_of(root, run_id) for run_id in runs.recorded(root)}
    first_id = first.result.run_id
    assert parents == {first_id: "", other.run_id: first_id, of_sweep.run_id: first_id, of_rerun.run_id: other.run_id}


def test_a_rerun_that_comes_out_as_a_recorded_run_leaves_its_record(again, first):
    _, other = again(confidence_level=0.5)
    before = runs.finished(other.run_directory.parents[1], first.result.run_id)
    _, back = again(run=other.run_id, confidence_level=0.95)
    root = back.run_directory.parents[1]
    assert back.run_id == first.result.run_id and runs.rerun_of(root, back.run_id) == ""
    assert runs.finished(root, back.run_id) == before and runs.find(root, "latest").name == back.run_id


def test_where_only_reruns_are_left_one_has_to_be_named(again, first):
    _, other = again(confidence_level=0.5)
    shutil.rmtree(other.run_directory.parent / first.result.run_id)
    with pytest.raises(StoreError, match=f"no run 'latest'.*only reruns are recorded: {other.run_id}"):
        again(baseline="none")


def test_every_report_and_table_says_where_its_numbers_come_from(again, first):
    _, other = again(confidence_level=0.999)
    for result, parent, level in ((first.result, "", "0.95"), (other, first.result.run_id, "0.999")):
        said = {
            "run": result.run_id,
            "rerun_of": parent,
            "date": json.loads((result.run_directory / "run.json").read_text())["finished"],
            "code": code_version(),
            "config": "tiny",
            "baseline": "time_loo",
            "cluster": "auto: sequences",
            "confidence_level": level,
            "seed_e": "42",
            "seed_u": "42",
        }
        tables = sorted(result.run_directory.glob("*.parquet"))
        assert {"results.parquet", "linearity.parquet", "agreement.parquet"} <= {path.name for path in tables}
        for path in tables:
            metadata = pq.read_schema(path).metadata
            assert {name: metadata[name.encode()].decode() for name in said} == said
            assert pq.read_table(path).equals(result.report.table(path.name))
        content = json.loads((result.run_directory / "headline.json").read_text())
        assert content["provenance"] == said and len(content["rows"]) == len(first.rows)
        comments = [line for line in (result.run_directory / "headline.csv").read_text().splitlines() if line[0] == "#"]
        assert comments == [f"# {name}: {value}" for name, value in said.items()]
        page = (result.run_directory / "report.md").read_text(encoding="utf-8").partition("## Provenance")[2]
        shared = (result.run_directory / "report.html").read_text(encoding="utf-8").partition(">Provenance<")[2]
        for value in filter(None, said.values()):
            assert f" `{value}` |" in page and f"<code>{value}</code>" in shared
    assert "intervals at 99.9 %." in (other.run_directory / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["score-e-batch", "rescore-e-batch", "first-order-u", "compute-update", "importance"])
def test_an_artifact_that_is_gone_is_named(again, first, away, stage):
    artifact = first.run.artifacts(stage)[0]
    shutil.rmtree(away / "artifacts" / stage / artifact.key)
    with pytest.raises(
        StoreError, match=rf"{stage}/{artifact.key} of checkpoint-3 is not in .*entropy-probe sweep .*config.yaml"
    ):
        again(confidence_level=0.5)


def test_a_damaged_artifact_is_set_aside_and_named(again, first, away):
    artifact = first.run.artifacts("first-order-e")[1]
    path = away / "artifacts" / "first-order-e" / artifact.key / "tokens.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=artifact.key):
        again(confidence_level=0.5)
    assert len(list((away / "artifacts" / ".quarantine").iterdir())) == 1


def test_a_run_of_another_version_is_refused_with_what_differs(again, first, away):
    path = away / "artifacts" / "runs" / first.result.run_id / "run.json"
    record = json.loads(path.read_text())
    record["config"]["variance"]["bootstrap"] = 1000
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"run\.json: variance\.bootstrap: unknown key"):
        again(confidence_level=0.5)


def test_a_run_that_was_not_recorded_is_refused_with_those_that_were(again, first, tmp_path):
    with pytest.raises(StoreError, match=f"no run 'tiny-0'.*recorded are {first.result.run_id}"):
        again(run="tiny-0")
    with pytest.raises(StoreError, match="no sweep is recorded there"):
        statistics.variance(VarianceRequest(), Store(tmp_path / "empty"), lambda *_: pytest.fail("ran"))


def test_the_record_has_no_absolute_path(first, home):
    """So that a store can be moved or copied as a whole."""
    record = json.loads((first.result.run_directory / "run.json").read_text())
    assert str(home) not in json.dumps(record["checkpoints"])
    assert str(home) not in json.dumps(record["report"])


# --- other modes -----------------------------------------------------------------------------------------------------


def test_distinct_prompts(away):
    batch = {"E_sampling_mode": "distinct", "B_E_values": [4], "G": 4}
    distinct = probe(config_of(away, checkpoints=[str(away / "run" / NAMES[0])], batch_config=batch))
    rows = distinct.rows
    assert {row["n_sequences"] for row in rows} == {16}
    assert all(value is None or value == value for row in rows for value in row.values())
    sampled = [
        row for a in distinct.run.artifacts("sample-e-batch") for row in a.table("sequences.parquet").to_pylist()
    ]
    assert [row["draw"] for row in sampled] == [0, 1, 2, 3] * 4
    assert len({row["prompt_id"] for row in sampled}) == 4
    u = {
        row["prompt_id"]
        for a in distinct.run.artifacts("sample-u-batch")
        for row in a.table("sequences.parquet").to_pylist()
    }
    assert u != {row["prompt_id"] for row in sampled}  # another stream, at the same seed
    assert not distinct.run.was_computed.keys() & {"sample-u-batch", "compute-update"}
    variance = distinct.run.inputs("variance")
    assert variance["units"] == "prompt"  # responses to one prompt are not independent
    small = by_eta(rows)[0][0.01]
    assert abs(small["paired_difference"]) <= 0.01 * abs(small["delta_h1"])
    assert small["gradient_check"] <= 1e-5


def test_float32_says_the_same(away, first):
    single = probe(config_of(away, checkpoints=[str(away / "run" / NAMES[0])], policy={"dtype": "float32"}))
    for row, double in zip(single.rows, first.rows, strict=False):
        assert row["gradient_check"] <= 1e-5
        assert row["H"] == pytest.approx(double["H"], rel=1e-5)
        assert row["delta_h1"] == pytest.approx(double["delta_h1"], rel=1e-4)
        assert abs(row["delta_h"] - double["delta_h"]) <= 1e-6 + 3 * row["noise_floor"]


def test_a_step_size_is_the_multiple_that_was_asked_for(redo, first):
    assert 0.123 * LEARNING_RATE / LEARNING_RATE != 0.123
    assert {row["eta_over_lr"] for row in redo(importance={"etas": [0, 0.123]}).rows} == {0, 0.123}


def test_absolute_step_sizes(redo):
    absolute = redo(importance={"etas": [0, 0.002], "eta_unit": "absolute"})
    assert absolute.run.was_computed == {"variance": len(NAMES), "report": 1}  # 0.002 is the learning rate
    assert {row["eta"] for row in absolute.rows} == {0.0, 0.002}


def test_weights_that_change_under_the_sweep_are_noticed(away):
    shutil.rmtree(away / "artifacts")
    config = parse_config(config_of(away))
    checkpoints = preflight(config)
    store = Store(config.store_root)
    run = Counting(store, pipeline.execution_for(config, checkpoints))
    shutil.copyfile(away / "run" / NAMES[1] / "model.safetensors", away / "run" / NAMES[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed after the sweep had begun"):
        pipeline.sweep(config, checkpoints, store, run)
    assert not (store.root / "sample-e-batch").exists() or not list((store.root / "sample-e-batch").iterdir())


def test_a_file_is_what_its_digest_says_or_is_not_used(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"prompt": "a"}')
    digest = file_digest(path)
    execution = Execution(paths={digest: path})
    execution.stamps({"source": digest})
    for change in (lambda: path.write_text('{"prompt": "b"}'), path.unlink):
        change()
        with pytest.raises(ConfigError, match=r"pool\.jsonl changed after the sweep had begun"):
            execution.stamps({"nested": [{"source": digest}]})
    execution.stamps({"source": "another"})


def test_a_reward_that_changes_under_the_sweep_is_noticed(away):
    config = parse_config(config_of(away))
    checkpoints = preflight(config)
    store = Store(config.store_root)
    shutil.rmtree(store.root / "reward-u-batch")
    run = Counting(store, pipeline.execution_for(config, checkpoints))
    (away / "reward.py").write_text((away / "reward.py").read_text() + "\n\ndef other(): ...\n")
    with pytest.raises(ConfigError, match="changed after the sweep had begun"):
        pipeline.sweep(config, checkpoints, store, run)
