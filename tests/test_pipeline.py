"""The whole sweep, by the direct runner: what comes out, what is computed again when something changes, what is not."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import torch
from pipeline_fixtures import (
    NAMES,
    Counting,
    Probe,
    make_gpt2,
    make_run,
    probe,
    skip_figures,
    values,
    write_reward,
)

from entropy_core.config.read import load_config, parse_config
from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import CheckpointError, ConfigError, StoreError
from entropy_core.estimates.tables import RESULTS, TABLES
from entropy_core.execution import Execution
from entropy_core.files.digests import file_digest
from entropy_core.numerics.choices import Estimator
from entropy_core.pipeline import catalogue, statistics
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.measure import NOISE_DRAWS
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner
from entropy_core.policy import spec
from entropy_core.store.store import Store

ETAS = [0, 0.01, 0.02, 1]
OF_THE_RUN = ("agreement", "report")  # which are of all checkpoints together
ESTIMATORS = list(get_args(Estimator))
P, G = 8, 4
BATCH = {"E_total_sequences": 16, "B_U": P, "G": G}


def config_of(folder: Path, **sections: Any) -> dict[str, Any]:
    """The sweep of this module, in a folder that has a run and a reward."""
    own = {
        "batch_config": BATCH,
        "update": {"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
        "importance": {"etas": ETAS, "estimators": ESTIMATORS},
    }
    for name, section in sections.items():
        own[name] = own[name] | section if name in own else section
    return values(folder / "run", folder / "artifacts", **own)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run, a reward, and the store of the first sweep; read only."""
    folder = tmp_path_factory.mktemp("home")
    make_run(folder / "run")
    write_reward(folder)
    return folder


@pytest.fixture(scope="module")
def first(home) -> Probe:
    return probe(config_of(home))


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Probe:
    """The sweep of a policy in which float64 is float64, so that equal means equal."""
    folder = tmp_path_factory.mktemp("exact")
    make_gpt2(folder / "run" / "checkpoint-3")
    write_reward(folder)
    return probe(config_of(folder))


@pytest.fixture
def away(home, first, tmp_path) -> Path:
    """A copy of everything, to change."""
    return shutil.copytree(home, tmp_path / "away")


@pytest.fixture(autouse=True)
def _without_figures(first, monkeypatch):
    skip_figures(monkeypatch)


@pytest.fixture
def no_model(monkeypatch):
    """From here on nothing may load a model or a tokenizer."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(spec, "load_policy", refuse)
    for name in ("policy.pretrained.AutoModelForCausalLM", "checkpoints.tokenizer.AutoTokenizer"):
        monkeypatch.setattr(f"entropy_core.{name}.from_pretrained", refuse)


def main_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["estimator"] == "per_decision"]


def by_eta(rows: list[dict[str, Any]]) -> list[dict[float, dict[str, Any]]]:
    """Per checkpoint and normalisation: the rows of per_decision by multiple of the learning rate."""
    groups: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in main_rows(rows):
        groups.setdefault((row["checkpoint"], row["normalization"]), {})[round(row["eta_over_lr"], 6)] = row
    return list(groups.values())


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_result_table_has_the_schema_with_its_units(first):
    path = first.result.run_directory / "results.parquet"
    assert pq.read_schema(path).equals(RESULTS, check_metadata=True)
    assert pq.read_schema(path).field("H").metadata[b"unit"].startswith(b"nats")
    rows = first.rows
    assert len(rows) == len(NAMES) * len(ETAS) * 2 * len(ESTIMATORS)
    assert {(row["checkpoint"], row["step"]) for row in rows} == {("checkpoint-3", 3), ("checkpoint-5", 5)}
    assert all(value == value for row in rows for value in row.values())


def test_every_stage_ran_once_per_shard(first):
    shards, checkpoints, moves = 2, len(NAMES), len(ETAS) - 1
    assert first.run.computed == {
        "load-prompts": 1,
        "sample-e-batch": checkpoints * shards,
        "score-e-batch": checkpoints * shards,
        "rescore-e-batch": checkpoints * NOISE_DRAWS,
        "load-checkpoint": checkpoints,
        "sample-u-batch": checkpoints * 4,
        "reward-u-batch": checkpoints,
        "score-u-batch": checkpoints * 4,
        "discriminate-u": checkpoints,
        "compute-update": checkpoints,
        "entropy-gradient": checkpoints,
        "first-order-e": checkpoints * shards,
        "first-order-u": checkpoints,
        "half-steps-u": checkpoints,
        "importance": checkpoints * shards * moves,
        "path-integral": checkpoints * shards * moves,
        "variance": checkpoints,
        "agreement": 1,
        "report": 1,
    }
    # central differences, a KL term, weights in shards, dropout
    unasked = {"calibrate", "score-u-reference", "load-weights", "dropout-u"}
    assert set(first.run.computed) == {stage.name for stage in catalogue.STAGES} - unasked


def test_without_a_step_nothing_changes(first):
    rows = [row for row in first.rows if row["eta"] == 0]
    assert len(rows) == len(NAMES) * 2 * len(ESTIMATORS)
    for row in rows:
        assert row["delta_h"] == row["delta_h1"] == row["curvature"] == row["paired_difference"] == 0.0
        assert row["delta_h_se"] == row["se_over_u"] == 0.0
        assert row["ess_fraction"] == pytest.approx(1.0, abs=1e-12)
        assert row["verdict"] == "reference"


def test_the_prediction_is_linear(first):
    for rows in by_eta(first.rows):
        for multiple in (0.01, 0.02):
            for column in ("delta_h1", "delta_h1_local", "inner_product", "se_given_u", "se_over_u"):
                assert rows[multiple][column] == pytest.approx(multiple * rows[1.0][column], rel=1e-12)


def test_a_small_step_does_what_was_predicted(first, exact):
    """And what remains is of second order: twice the step, four times the remainder."""
    for rows in by_eta(first.rows) + by_eta(exact.rows):
        assert abs(rows[0.01]["paired_difference"]) <= 0.01 * abs(rows[0.01]["delta_h1"])
    for rows in by_eta(exact.rows):  # float64 without casts, where nothing is lost in the noise
        small, twice = rows[0.01], rows[0.02]
        assert abs(small["paired_difference"]) > 20 * small["noise_floor"]
        assert twice["paired_difference"] / small["paired_difference"] == pytest.approx(4, rel=0.1)


def test_forward_and_backward_agree(first, exact):
    assert all(row["gradient_check"] <= 1e-5 for row in first.rows)
    assert all(row["gradient_check"] <= 1e-10 for row in exact.rows)
    for row in main_rows(exact.rows):
        assert row["inner_product"] == pytest.approx(row["delta_h1"], rel=1e-10)


def test_the_scores_have_mean_zero(first, exact):
    assert all(abs(row["mean_score_z"]) <= 4 for row in first.rows + exact.rows)


def test_the_batches_are_what_was_asked_for(first):
    sampled = first.run.artifacts("sample-e-batch") + first.run.artifacts("sample-u-batch")
    assert {shard.summary["attention"] for shard in sampled} == {"sdpa"}  # not what the law is differentiated with
    e_shards, u_shards = (first.run.artifacts(name) for name in ("sample-e-batch", "sample-u-batch"))
    e_first, e_second = e_shards[:2], e_shards[2:]
    assert [shard.table("sequences.parquet").num_rows for shard in e_shards] == [8] * 4
    columns = [[shard.table("sequences.parquet") for shard in shards] for shards in (e_first, e_second)]
    ids, prompts = (
        [[t[name].to_pylist() for t in tables] for tables in columns] for name in ("sequence_id", "prompt_id")
    )
    assert ids[0] == ids[1] == [list(range(8)), list(range(8, 16))]
    assert prompts[0] == prompts[1]  # the same prompts at every checkpoint
    u = [row for shard in u_shards[:4] for row in shard.table("sequences.parquet").to_pylist()]
    assert [row["draw"] for row in u] == list(range(G)) * P
    assert len({row["prompt_id"] for row in u}) == P
    assert {row["finish_reason"] for row in u} == {"eos", "length"}
    assert all(row["length"] <= 8 for row in u)


def test_the_run_folder_has_what_people_open(first, home):
    directory = first.result.run_directory
    assert directory == home / "artifacts" / "runs" / first.result.run_id
    assert {path.name for path in directory.iterdir()} == {
        *("results.parquet", "agreement.parquet", "report.md", "report.html", "config.yaml", "run.json"),
        *(f"{table}.parquet" for table in TABLES),
        *(
            f"{figure}.{kind}"
            for figure in ("prediction", "eta_sweep", "training", "tokens")
            for kind in ("png", "svg")
        ),
    }
    assert load_config(directory / "config.yaml") == first.config
    page = (directory / "report.md").read_text(encoding="utf-8")
    of_rows = len(ETAS) * len(ESTIMATORS) + (len(ETAS) - 1) * len(ESTIMATORS)  # results, verdicts
    assert page.count("\n| checkpoint-3 | ") == of_rows + 3 + len(ESTIMATORS)  # origins, checks, p-values; linearity
    assert "2 checkpoint(s), E of 16 sequences, U of 8 prompts" in page


# --- what is computed again ------------------------------------------------------------------------------------------


def test_the_same_sweep_again_computes_nothing_and_loads_nothing(away, first, request):
    config = parse_config(config_of(away))
    checkpoints = preflight(config)
    request.getfixturevalue("no_model")
    store = Store(config.store_root)
    run = Counting(store, pipeline.execution_for(config, checkpoints))
    again = pipeline.sweep(config, checkpoints, store, run)
    assert run.was_computed == {}
    assert again.run_id == first.result.run_id
    assert [artifact.digest for _, _, artifact in run.asked] == [artifact.digest for _, _, artifact in first.run.asked]


def test_two_stores_get_the_same_content(away, first):
    """Nothing in an artifact depends on when or where it was made."""
    shutil.rmtree(away / "artifacts")
    second = probe(config_of(away, checkpoints=[str(away / "run" / NAMES[0])]))
    digests = {artifact.digest for _, _, artifact in first.run.asked}
    assert {artifact.digest for stage, _, artifact in second.run.asked if stage not in OF_THE_RUN} <= digests


def test_a_moved_run_is_the_same_run(away, first):
    (away / "run").rename(away / "moved")
    (away / "reward.py").rename(away / "moved" / "reward.py")
    reward = {"reward": f"{away / 'moved' / 'reward.py'}:share_of_low_digits"}
    moved = probe(config_of(away, checkpoints=[str(away / "moved" / "checkpoint-*")], update=reward))
    assert moved.run.was_computed == {}
    assert moved.result.run_id == first.result.run_id


@pytest.fixture
def redo(away):
    """The sweep again with some settings changed: how often each stage was computed."""

    def run(**sections: Any) -> Probe:
        return probe(config_of(away, **sections))

    return run


def test_execution_settings_are_in_no_key(redo):
    again = redo(generation={"gen_batch_size": 5, "tf_batch_size": 3}, execution={"head_chunk_megabytes": 1e-3})
    assert again.run.was_computed == {}
    assert again.run.execution.tf_batch_size == 3


def columns_of(run: Counting, stage: str, file: str = "tokens.safetensors") -> dict[str, torch.Tensor]:
    """The flat tensors of all shards of a stage, one after the other; offsets as lengths."""
    tensors = [artifact.tensors(file) for artifact in run.artifacts(stage)]
    return {name: torch.cat([t[name].diff() if "offsets" in name else t[name] for t in tensors]) for name in tensors[0]}


@pytest.fixture
def elsewhere(away, redo):
    """A sweep of one checkpoint, and the same with other execution settings in another store."""

    def run(execution: dict[str, Any], **sections: Any) -> tuple[Probe, Probe]:
        one = {"checkpoints": [str(away / "run" / NAMES[0])], "importance": {"etas": [0, 1]}}
        usual, other = redo(**one), redo(**one, execution=execution | {"artifacts": str(away / "other")}, **sections)
        assert "sample-e-batch" in other.run.was_computed
        return usual, other

    return run


def agree(usual: Probe, other: Probe) -> None:
    for stage in ("sample-e-batch", "sample-u-batch"):
        a, b = columns_of(usual.run, stage), columns_of(other.run, stage)
        assert all(torch.equal(a[name], b[name]) for name in a)
    for stage in ("score-e-batch", "first-order-e", "importance"):
        a, b = columns_of(usual.run, stage), columns_of(other.run, stage)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5 * float(a[name].abs().max()))
    for row, same in zip(usual.rows, other.rows, strict=True):
        for name in ("H", "H_se", "delta_h1", "se_given_u", "se_over_u", "delta_h", "delta_h_se", "ess", "update_norm"):
            assert same[name] == pytest.approx(row[name], rel=1e-4, abs=1e-9), name


def test_the_micro_batches_do_not_change_the_numbers(elsewhere):
    """To the rounding of the norms, which are float32."""
    agree(*elsewhere(generation={"gen_batch_size": 5, "tf_batch_size": 3}, execution={"head_chunk_megabytes": 1e-3}))


def test_the_shards_do_not_change_the_numbers(elsewhere):
    usual, other = elsewhere(execution={"shard_size": 5})
    assert len(other.run.artifacts("sample-e-batch")) == 4
    agree(usual, other)


def test_more_sequences_cost_only_the_new_shards(redo, first):
    more = redo(batch_config={"E_total_sequences": 24})
    new, moves = len(NAMES), len(ETAS) - 1
    assert more.run.was_computed == {
        "sample-e-batch": new,
        "score-e-batch": new,
        "rescore-e-batch": new * NOISE_DRAWS,  # of the first 1,024 sequences, which are not all there yet
        "entropy-gradient": new,
        "first-order-e": new,
        "first-order-u": new,
        "half-steps-u": new,
        "importance": new * moves,
        "path-integral": new * moves,
        "variance": new,
        "agreement": 1,
        "report": 1,
    }
    before, after = first.run.artifacts("sample-e-batch"), more.run.artifacts("sample-e-batch")
    assert [shard.digest for shard in after[:2]] == [shard.digest for shard in before[:2]]
    assert after[2].table("sequences.parquet")["sequence_id"].to_pylist() == list(range(16, 24))


def test_a_new_step_size_costs_only_itself(redo):
    more = redo(importance={"etas": [*ETAS, -0.5]})
    assert more.run.was_computed == {
        "importance": 2 * len(NAMES),
        "path-integral": 2 * len(NAMES),
        "variance": len(NAMES),
        "report": 1,
    }


def test_a_step_size_less_costs_only_the_statistics(redo, monkeypatch):
    monkeypatch.setattr(spec, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    assert redo(importance={"etas": [0, 1]}).run.was_computed == {"variance": len(NAMES), "report": 1}


def test_another_optimizer_setting_samples_nothing(redo):
    computed = redo(update={"max_grad_norm": 1e-3}).run.was_computed
    on_e = {"first-order-e", "importance", "path-integral"}
    of_u = {"compute-update", "first-order-u", "half-steps-u"}
    assert set(computed) == on_e | of_u | {"variance", "agreement", "report"}


def test_another_seed_of_e_leaves_u_alone(redo):
    computed = redo(batch_config={"E_batch_seed": 7}, importance={"etas": [0]}).run.was_computed
    assert not set(computed) & {"sample-u-batch", "reward-u-batch", "compute-update", "load-checkpoint", "load-prompts"}
    assert computed["sample-e-batch"] == 2 * len(NAMES)


def test_an_edited_reward_costs_the_update_but_no_sample(redo, away):
    write_reward(away, (away / "reward.py").read_text().replace("01234", "56789"))
    computed = redo(importance={"etas": [0]}).run.was_computed
    assert not any("sample" in name or "score" in name for name in computed)
    assert computed["reward-u-batch"] == computed["compute-update"] == len(NAMES)


def test_a_killed_sweep_goes_on_where_it_was(away, first):
    """Whatever stage it is killed in, and whatever that stage had written."""
    shutil.rmtree(away / "artifacts")
    config = parse_config(config_of(away, checkpoints=[str(away / "run" / NAMES[0])], importance={"etas": [0, 1]}))
    checkpoints = preflight(config)
    store = Store(config.store_root)
    counting = Counting(store, pipeline.execution_for(config, checkpoints))
    asked = 0

    def dying(stage, inputs, label):
        nonlocal asked
        asked += 1
        if asked in (3, 12):
            (store.root / stage.name / ".tmp-left-behind").mkdir(parents=True)
            raise KeyboardInterrupt
        return counting(stage, inputs, label)

    results = []
    for _ in range(3):
        try:
            results.append(pipeline.sweep(config, checkpoints, store, Runner(dying)))
        except KeyboardInterrupt:
            assert not (store.root / "runs").exists()
    assert len(results) == 1
    computed = [artifact for stage, _, artifact in counting.asked]
    assert sum(counting.computed.values()) == len({(a.stage, a.key) for a in computed})
    digests = {artifact.digest for _, _, artifact in first.run.asked}
    assert {a.digest for a in computed if a.stage not in ("variance", *OF_THE_RUN)} <= digests


# --- the statistics again --------------------------------------------------------------------------------------------


@pytest.fixture
def again(away, no_model):
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


def test_a_run_can_be_named_and_the_latest_is_the_default(again, first):
    _, other = again(confidence_level=0.5)
    _, named = again(run=first.result.run_id, confidence_level=0.75)
    assert load_config(named.run_directory / "config.yaml").variance.confidence_level == 0.75
    _, latest = again(baseline="none")
    assert load_config(latest.run_directory / "config.yaml").variance.confidence_level == 0.75
    assert len({first.result.run_id, other.run_id, named.run_id, latest.run_id}) == 4


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
