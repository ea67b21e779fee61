"""The callback in a real GRPO run: what it writes, what it logs, and how little it does."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from entropy_core import training
from entropy_core.config import plain_yaml
from entropy_core.demo.run import build_tokenizer
from entropy_core.demo.training_run import quiet
from entropy_core.files.run_folder import FOLDER, stop_file, tell_numbers
from entropy_core.pipeline.init import configuration_of
from entropy_core.prompts.arithmetic import problems
from entropy_core.training import ProbeCallback

pytest.importorskip("trl")

from trainer_rewards import low_digits
from transformers import TrainerCallback
from watch_trainer import trainer

PROBED = {"checkpoint": "checkpoint-2", "step": 2, "H": 1.5, "delta_h1": -0.25, "delta_h": None, "verdict": "resolved"}


class Tracker(TrainerCallback):
    """Stands for one that the trainer reports to; tells numbers when the trainer has made its third step."""

    def __init__(self, run: Path, stop_at: int = 0) -> None:
        self.run, self.stop_at, self.logged = run, stop_at, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            tell_numbers(self.run, PROBED)
            tell_numbers(self.run, PROBED | {"checkpoint": "checkpoint-10", "step": 10})
        if state.global_step == self.stop_at:
            stop_file(self.run).write_text("")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append(dict(logs))


def trained(run: Path, steps: int, reward: Any = low_digits, **more: Any) -> tuple[Any, Tracker]:
    tracker = Tracker(run, **more)
    with torch.random.fork_rng(devices=[]), quiet(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(run, steps, reward, [tracker])
        made.train()
    return made, tracker


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Any, Tracker]:
    folder = tmp_path_factory.mktemp("run")
    return folder, *trained(folder, 6)


def test_it_writes_what_no_checkpoint_records(run):
    folder, made, _ = run
    hint, _ = plain_yaml.read(folder / "entropy-probe.yaml")
    reward = Path(__file__).parents[1] / "trainer_rewards.py"
    assert hint == {
        "batch_config": {"dataset_name": f"{FOLDER}/prompts.parquet"},
        "update": {"reward": [f"{reward}:low_digits"]},
    }
    assert pq.read_table(folder / FOLDER / "prompts.parquet").to_pylist() == [
        {"prompt": row["prompt"]} for row in problems("train", 64)
    ]
    assert "FILL_IN" not in configuration_of(folder, folder)  # with the rest from the checkpoints
    assert sorted(path.name for path in (folder / FOLDER / "batches").iterdir()) == [
        f"checkpoint-{step}.parquet" for step in (2, 4, 6)
    ]
    batch = pq.read_table(folder / FOLDER / "batches" / "checkpoint-6.parquet").to_pylist()
    tokenizer = build_tokenizer()
    prompts = {row["prompt"] for row in problems("train", 64)}
    assert len(batch) == 16 and {tokenizer.decode(row["prompt_ids"]) for row in batch} <= prompts
    assert all(1 <= len(row["completion_ids"]) <= 8 for row in batch)
    assert sum(row["advantage"] for row in batch) == pytest.approx(0, abs=1e-5)
    assert sorted(tokenizer.decode(row["completion_ids"], skip_special_tokens=True) for row in batch) == sorted(
        made._logs["completion"]
    )


def test_no_file_of_a_checkpoint_is_its_own(run):
    """What it writes is beside the checkpoints, which have the same digests without it."""
    folder, *_ = run
    names = {path.name for path in (folder / "checkpoint-6").rglob("*")}
    assert not [name for name in names if "probe" in name or name.endswith(".parquet")]


def test_what_the_probe_found_is_in_the_log_once_for_each_checkpoint(run):
    _, made, tracker = run
    history = [entry for entry in made.state.log_history if "entropy_probe/H" in entry]
    assert [(entry["step"], entry["entropy_probe/step"]) for entry in history] == [(3, 2), (4, 10)]
    assert all(entry["entropy_probe/verdict"] == "resolved" and "reward" in entry for entry in history)
    told = [logs for logs in tracker.logged if "entropy_probe/H" in logs]
    assert [logs["entropy_probe/delta_h1"] for logs in told] == [-0.25, -0.25]
    assert "entropy_probe/delta_h" not in told[0] and "entropy_probe/verdict" not in told[0]  # numbers only


def test_a_training_from_the_beginning_logs_nothing_old_and_stops_when_asked(run):
    folder, *_ = run
    made, tracker = trained(folder, 8, stop_at=4)
    assert not [logs for logs in tracker.logged if "entropy_probe/H" in logs]
    assert made.state.global_step == 4
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["max_steps"] == 8


def test_it_does_less_than_a_fiftieth_of_the_work(tmp_path):
    """Calls of Python and C functions in its hooks, of those of the training; without the writing of the prompts."""
    calls, inside = {"all": 0, "callback": 0}, []
    hooks = [getattr(ProbeCallback, name).__wrapped__.__code__ for name in ("on_log", "on_save")]

    def count(frame: Any, event: str, _: Any) -> None:
        if frame.f_code in hooks and event in ("call", "return"):
            inside.append(None) if event == "call" else inside.pop()
        if event in ("call", "c_call"):
            calls["callback" if inside else "all"] += 1

    with torch.random.fork_rng(devices=[]), quiet(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(tmp_path, 4, low_digits, logging_steps=1, save_steps=2)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            made.train()
        finally:
            sys.setprofile(before)
    written = sum(path.stat().st_size for path in (tmp_path / FOLDER / "batches").iterdir())
    copied = sum(path.stat().st_size for path in tmp_path.glob("checkpoint-*/*"))
    print(f"{calls['callback']} of {calls['all']} calls, {written} of {copied} bytes")
    assert 0 < calls["callback"] < 0.02 * calls["all"]
    assert written < 0.1 * copied  # of a policy of 5,000 parameters; of a larger one it is nothing


def test_nothing_that_goes_wrong_ends_the_training(tmp_path, monkeypatch, caplog):
    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(training, "write_whole", fails)
    with caplog.at_level(logging.WARNING, logger="entropy_probe.training"):
        made, _ = trained(tmp_path, 2)
    assert made.state.global_step == 2
    assert {record.message for record in caplog.records} == {
        f"{hook} of entropy-probe failed, and the training goes on: the disk is full"
        for hook in ("on_train_begin", "on_save")
    }


def test_a_reward_of_the_script_itself_and_a_hint_of_somebody_else(tmp_path, caplog):
    training._write_hint(tmp_path, None, [lambda completions, **_: [0.0]])
    assert not (tmp_path / "entropy-probe.yaml").exists()
    assert "update.reward: <lambda>: put each function into a module" in caplog.text
    assert "batch_config.dataset_name" in caplog.text
    (tmp_path / "entropy-probe.yaml").write_text("update: {reward: arithmetic}\n")
    training._write_hint(tmp_path, None, [low_digits])
    assert (tmp_path / "entropy-probe.yaml").read_text() == "update: {reward: arithmetic}\n"
    assert training._name_of(json.dumps) == f"{json.__file__}:dumps"
    assert training._name_of(functional.relu) == "torch.nn.functional:relu"
