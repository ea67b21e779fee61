"""`entropy-probe init`: a configuration from what a run's own files say, each line with its source."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipeline_fixtures import NAMES, make_run

from entropy_core.config.read import load_config
from entropy_core.files.checkpoint import RUN_HINT
from entropy_core.pipeline.preflight import preflight
from flows.cli import main

trl = pytest.importorskip("trl")

HINT = "batch_config: {dataset_name: arithmetic, split: train}\nupdate: {reward: arithmetic}\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("original") / "grpo run")


@pytest.fixture
def run(original, tmp_path, monkeypatch) -> Path:
    """A run of TRL without what no checkpoint records."""
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(original, tmp_path / "grpo run"))
    say(run)
    return run


def say(run: Path, **settings: Any) -> None:
    own = {"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 8, "temperature": 0.9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = trl.GRPOConfig(
            output_dir=str(run), use_cpu=True, bf16=False, report_to=[], loss_type="dr_grpo", **own | settings
        )
    for name in NAMES:
        torch.save(config, run / name / "training_args.bin")


def test_the_file_runs_as_it_is_where_everything_is_known(run, capsys):
    (run / RUN_HINT).write_text(HINT)
    assert main(["init", "grpo run", "-o", "probe.yaml"]) == 0
    assert capsys.readouterr().out == ""
    text = Path("probe.yaml").read_text()
    config = load_config("probe.yaml", must_exist=True)
    assert config.name == "grpo-run" and config.checkpoints == [str(run)]
    assert (config.batch_config.B_U, config.batch_config.G) == (3, 4)
    assert (config.generation.temperature, config.generation.max_new_tokens) == (0.9, 8)
    assert (config.update.loss, config.update.reward) == ("dr_grpo", "arithmetic")
    checkpoints = preflight(config)
    assert [checkpoint.name for checkpoint in checkpoints] == list(NAMES)
    assert checkpoints[0].warnings == ()
    # Every setting says where it is from.
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert all("# " in line for line in lines)
    source = {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines}
    assert source["B_U"] == "read from training_args.bin (12 responses × 1 accumulated × 1 process / 4 per prompt)"
    assert source["dataset_name"] == source["reward"] == "read from entropy-probe.yaml"
    assert source["prompt_column"] == "assumed"
    assert main(["init", "grpo run", "-o", "probe.yaml"]) == 2  # it overwrites nothing
    assert "is there already" in capsys.readouterr().err


def test_what_nobody_can_know_is_to_be_filled_in(run, capsys):
    for name in NAMES:
        log = [{"step": 1, "rewards/accuracy/mean": 0.5}]
        (run / name / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": log}))
    assert main(["init", "grpo run"]) == 0
    text = capsys.readouterr().out
    assert "assumed: which reward?" in text and "the trainer logged accuracy" in text
    Path("probe.yaml").write_text(text)
    assert main(["sweep", "probe.yaml", "--direct"]) == 2
    said = capsys.readouterr().err
    assert "batch_config.dataset_name: say here which prompts the run was trained on" in said
    assert "update.reward: say here which function rewarded" in said
    Path("probe.yaml").write_text(text.replace("dataset_name: FILL_IN", "dataset_name: arithmetic"))
    Path("probe.yaml").write_text(Path("probe.yaml").read_text().replace("reward: FILL_IN", "reward: arithmetic"))
    assert len(preflight(load_config("probe.yaml", must_exist=True))) == 2


def test_what_is_not_modelled_is_said_and_not_passed_over(run, capsys):
    say(run, delta=0.9)
    (run / RUN_HINT).write_text(HINT)
    assert main(["init", "grpo run"]) == 0
    text = capsys.readouterr().out
    assert "# WARNING: The trainer had delta = 0.9" in text
    Path("probe.yaml").write_text(text)
    assert main(["plan", "probe.yaml"]) == 2  # until the user says so
    assert "delta" in capsys.readouterr().err
    Path("probe.yaml").write_text(text.replace("# leave_out", "leave_out"))
    assert len(preflight(load_config("probe.yaml", must_exist=True))[0].warnings) == 1


def test_the_paths_start_at_the_folder_of_the_file(run):
    (run / RUN_HINT).write_text("update: {reward: 'r.py:f'}\nbatch_config: {dataset_path: data}\n")
    Path("configs").mkdir()
    assert main(["init", "grpo run", "-o", "configs/probe.yaml"]) == 0
    text = Path("configs/probe.yaml").read_text()
    assert 'checkpoints: ["../grpo run"]' in text
    assert f"reward: {run}/r.py:f" in text and f"dataset_path: {run}/data" in text


@pytest.mark.parametrize("hint", ["- a list\n", "execution: {device: cpu}\n", "update: {colour: red}\n"])
def test_a_hint_that_is_none_is_refused(run, hint, capsys):
    (run / RUN_HINT).write_text(hint)
    assert main(["init", "grpo run"]) == 2
    assert RUN_HINT in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        assert main(["init", name]) == 2
        assert capsys.readouterr().err.endswith(".\n")


@pytest.mark.attack("a run that names code, or whose name is a setting")
def test_a_name_is_no_setting(run, capsys):
    evil = next(run.glob("checkpoint-*")).rename(run / "x\nloss: evil.py:f\n#")
    assert main(["init", str(evil)]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert "loss" not in settings and settings["checkpoints"] == [str(evil)]


@pytest.mark.attack("a run that names code, or whose name is a setting")
def test_code_that_a_run_names_is_warned_of(run, capsys):
    (run / RUN_HINT).write_text("update: {reward: ['arithmetic', 'r.py:f']}\n")
    assert main(["init", str(run)]) == 0
    said = capsys.readouterr().out
    assert "names code, which a sweep executes" in said and said.count(f"WARNING: {RUN_HINT}") == 1
    assert str(run.absolute() / "r.py") in said.splitlines()[1]
