"""The whole sweep, by the direct runner: what comes out, what is computed again when something changes, what is not."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pipeline_fixtures import (
    NAMES,
    Counting,
    Probe,
    make_gpt2,
    probe,
    skip_figures,
    write_reward,
)
from swept_fixtures import ESTIMATORS, ETAS, OF_THE_RUN, G, P, by_eta, config_of, main_rows

from entropy_core.config.read import load_config, parse_config
from entropy_core.estimates.tables import RESULTS, TABLES
from entropy_core.pipeline import catalogue
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.measure import NOISE_DRAWS
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner
from entropy_core.policy import spec
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


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Probe:
    """The sweep of a policy in which float64 is float64, so that equal means equal."""
    folder = tmp_path_factory.mktemp("exact")
    make_gpt2(folder / "run" / "checkpoint-3")
    write_reward(folder)
    return probe(config_of(folder))


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_result_table_has_the_schema_with_its_units(first):
    path = first.result.run_directory / "results.parquet"
    schema = pq.read_schema(path)
    assert schema.remove_metadata().equals(RESULTS.remove_metadata())
    assert [field.metadata for field in schema] == [field.metadata for field in RESULTS]
    assert schema.field("H").metadata[b"unit"].startswith(b"nats")
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
    # central differences, a KL term, weights in shards, dropout, the price, interventions, the phase, a rehearsal, and
    # a recorded U
    unasked = {"calibrate", "score-u-reference", "load-weights", "dropout-u", "reward-e-batch", "price"}
    unasked |= {"half-sensitivities", "screen", "predict", "altered-step", "interventions", "phase-step", "phase"}
    unasked |= {"rehearsal-step", "rehearsal"}
    unasked |= {"recorded-u-batch", "real-step", "post-mortem", "reward-gradient", "reward-shares-u"}
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
        *("headline.csv", "headline.json"),
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
    request.getfixturevalue("without_model")
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


def test_neither_micro_batches_nor_shards_change_the_numbers(away, redo):
    """To the rounding of the norms, which are float32. Both are changed at once, in another store."""
    one = {"checkpoints": [str(away / "run" / NAMES[0])], "importance": {"etas": [0, 1]}}
    small = {"head_chunk_megabytes": 1e-3, "shard_size": 5, "artifacts": str(away / "other")}
    usual = redo(**one)
    other = redo(**one, generation={"gen_batch_size": 5, "tf_batch_size": 3}, execution=small)
    assert len(other.run.artifacts("sample-e-batch")) == other.run.was_computed["sample-e-batch"] == 4
    agree(usual, other)


def test_more_sequences_cost_only_the_new_shards(redo, first):
    more = redo(batch_config={"E_total_sequences": 24}, importance={"etas": [0, 1]})
    new, moves = len(NAMES), 1
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
    computed = redo(update={"max_grad_norm": 1e-3}, importance={"etas": [0, 1]}).run.was_computed
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
