"""Bad checkpoints, pools and configurations: refused on one line before anything is sampled."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input_fixtures import (
    NAME,
    change_json,
    change_optimizer,
    config_of,
    cut,
    finite,
    forget_tokenizer,
    one_line,
    prompts,
    refused,
    set_rates,
    write_pool,
)
from pipeline_fixtures import (
    LEARNING_RATE,
    make_gpt2,
    probe,
)
from safetensors.torch import load_file, save_file

from entropy_core.config.read import load_config, parse_config
from entropy_core.errors import CheckpointError, ConfigError, NonFiniteError, PromptError
from entropy_core.pipeline.preflight import preflight
from entropy_core.store.store import Store

pytest_plugins = ["bad_input_fixtures"]


@pytest.fixture
def home(breakable) -> Path:
    return breakable


# --- checkpoints that cannot be probed -------------------------------------------------------------------------------


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no optimizer": (lambda d: (d / "optimizer.pt").unlink(), r"no optimizer\.pt.*save_only_model=False"),
    "optimizer cut off": (lambda d: cut(d / "optimizer.pt", 1000), r"optimizer\.pt is not a complete archive"),
    "learning rate 0": (
        lambda d: change_optimizer(d, lambda saved: set_rates(saved, 0.0)),
        "learning rate 0 in every param group.*set `learning_rate`",
    ),
    "weights cut off": (lambda d: cut(d / "model.safetensors", 5000), r"model\.safetensors cannot be opened"),
    "weights garbled": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64 + (d / "model.safetensors").read_bytes()[64:]),
        r"model\.safetensors cannot be opened",
    ),
    "weights empty": (lambda d: cut(d / "model.safetensors", 0), r"model\.safetensors cannot be opened"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "other config": (lambda d: change_json(d / "config.json", hidden_size=32), "other shapes than config.json says"),
    "config cut off": (lambda d: cut(d / "config.json", 40), r"config\.json is not readable JSON"),
    "no tokenizer": (forget_tokenizer, "no tokenizer that can be loaded.*save the tokenizer"),
    "no trainer state": (lambda d: (d / "trainer_state.json").unlink(), r"no trainer_state\.json"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds both an adapter"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_probed(home, spoil, message):
    spoil(home / "run" / NAME)
    assert NAME in refused(CheckpointError, message, config_of(home))


def test_one_bad_checkpoint_of_several_is_left_out_and_said(home, monkeypatch):
    """Half-written, or removed by its trainer meanwhile; a sweep that is strict, or has nothing else, is refused."""
    (home / "run" / "checkpoint-5" / "optimizer.pt").unlink()
    for checkpoints in ([str(home / "run" / "checkpoint-*")], [str(home / "run")]):
        config = config_of(home, checkpoints=checkpoints)
        strict = config | {"execution": config["execution"] | {"unusable_checkpoints": "refuse"}}
        assert "checkpoint-5" in refused(CheckpointError, r"no optimizer\.pt", strict)
        (found,) = preflight(parse_config(config))
        (warning,) = found.warnings
        assert found.name == NAME and re.match(r"checkpoint-5 is left out: checkpoint-5 has no optimizer\.pt", warning)

    def removed(directory: Path, *_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(directory / "optimizer.pt"))

    monkeypatch.setattr("entropy_core.pipeline.usable.read_checkpoint", removed)
    with pytest.raises(CheckpointError, match="the trainer removed it"):
        preflight(parse_config(config))


def test_a_checkpoint_alone_is_refused(home):
    (home / "run" / NAME / "optimizer.pt").unlink()
    refused(CheckpointError, r"no optimizer\.pt", config_of(home))


def test_moments_that_are_nan_stop_the_sweep_before_anything_is_sampled(home):
    """They are read by the first stage, which is run for all checkpoints first."""
    change_optimizer(home / "run" / "checkpoint-5", lambda saved: saved["state"][0]["exp_avg"].fill_(math.nan))
    config = config_of(home, checkpoints=[str(home / "run" / "checkpoint-*")])
    with pytest.raises(CheckpointError, match=r"checkpoint-5/optimizer\.pt: moments are NaN.*an earlier") as raised:
        probe(config)
    one_line(raised.value)
    assert {stage for stage, _ in Store(config["execution"]["artifacts"]).names()} == {"load-checkpoint"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("checkpoint-9*", "No directory matches .*checkpoint-9"),
        ("checkpoint-3/config.json", "No directory matches"),
        ("..", r"has no config\.json"),
    ],
)
def test_a_pattern_without_a_checkpoint(home, pattern, message):
    refused(CheckpointError, message, config_of(home, checkpoints=[str(home / "run" / pattern)]))


def test_a_saved_learning_rate_of_zero_is_that_of_the_step_before_for_that_checkpoint_alone(home):
    """The end of a linear schedule; the last rate above 0 that the trainer logged is the schedule's neighbour."""
    last = home / "run" / "checkpoint-5"
    change_optimizer(last, lambda saved: set_rates(saved, 0.0))
    log = [{"step": step, "learning_rate": 1e-3 * (5 - step), "loss": 0.0} for step in range(1, 6)]
    (last / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": log}))
    done = probe(config_of(home, checkpoints=[str(home / "run")]))
    assert {row["checkpoint"]: row["learning_rate"] for row in done.rows} == {NAME: LEARNING_RATE, last.name: 1e-3}
    said = "The saved learning rate is 0; the step has 0.001, that of step 4 in trainer_state.json."
    assert said in (done.result.run_directory / "report.md").read_text()
    assert said in done.checkpoints[1].assumptions and said not in done.checkpoints[0].assumptions


def test_a_learning_rate_that_is_given_takes_the_place_of_zero(home):
    """The schedule has ended; and with the rate that was saved before, everything is as it was."""
    before = finite(probe(config_of(home)))
    change_optimizer(home / "run" / NAME, lambda saved: set_rates(saved, 0.0))
    after = probe(config_of(home, update={"learning_rate": LEARNING_RATE}))
    assert [row["delta_h1"] for row in finite(after)] == [row["delta_h1"] for row in before]
    assert {row["learning_rate"] for row in after.rows} == {LEARNING_RATE}
    assert "Learning rate 0.002 in place of the saved 0" in (after.result.run_directory / "report.md").read_text()


def test_weights_with_a_nan_name_the_sequence(home):
    path = home / "run" / NAME / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"the logits of sequence \d+ are not finite at position \d+") as raised:
        probe(config_of(home))
    one_line(raised.value)


# --- pools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ({"dataset_name": "gsm9k"}, PromptError, "unknown dataset 'gsm9k'.*arithmetic, gsm8k"),
        ({"dataset_name": "/no/such/pool.jsonl"}, PromptError, "cannot be read"),
        ({"split": "validation"}, PromptError, "no split 'validation'.*train, test"),
        ({"U_split": "dev"}, PromptError, "no split 'dev'"),
        ({"prompt_column": "question"}, PromptError, "no string in column 'question'.*prompt_column"),
        ({"B_U": 513}, ConfigError, "B_U asks for 513 distinct prompts, but split 'train' has 512.*at most 512"),
        (
            {"E_sampling_mode": "distinct", "B_E_values": [600], "E_split": "test"},
            ConfigError,
            "B_E_values asks for 600 distinct prompts, but split 'test' has 512",
        ),
        ({"E_sampling_mode": "distinct", "B_E_values": [1]}, ConfigError, "there is one: a standard error needs two"),
        ({"E_total_sequences": 1}, ConfigError, "batch_config.E_total_sequences"),
        ({"B_V": 8}, ConfigError, "batch_config.B_V: unknown key"),
    ],
)
def test_a_batch_that_cannot_be_drawn(home, batch, kind, message):
    refused(kind, message, config_of(home, batch_config=batch))


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        ([*prompts("1+2="), '{"prompt": "3+4="'], PromptError, r"pool\.jsonl:2 is not JSON"),
        (prompts("1+2=", "1+2="), PromptError, "repeat an earlier prompt"),
        (prompts("1+2=", "x+y="), PromptError, "tokenizer of .*checkpoint-3 cannot encode .*use a dataset that fits"),
        (prompts("1+2="), ConfigError, "B_U asks for 2 distinct prompts, but split 'train' has 1"),
        ([], PromptError, "has no prompts"),
    ],
    ids=["broken line", "copies", "other characters", "one prompt", "empty"],
)
def test_a_file_that_is_no_pool(home, lines, kind, message):
    refused(kind, message, config_of(home, batch_config=write_pool(home, lines)))


def test_the_sampling_settings_of_a_checkpoint_are_not_used(home):
    """They are for chatting: what is sampled is what is scored, the policy itself."""
    config = config_of(home, importance={"etas": [0]})
    before = probe(config)
    chatting = {"do_sample": True, "top_k": 1, "top_p": 0.5, "temperature": 0.1, "repetition_penalty": 2.0}
    change_json(home / "run" / NAME / "generation_config.json", **chatting)
    after = probe(config)
    for stage in ("sample-e-batch", "sample-u-batch"):
        assert after.run.computed[stage] == before.run.computed[stage] > 0  # the file could have mattered
        for a, b in zip(before.run.artifacts(stage), after.run.artifacts(stage), strict=True):
            assert a.digest == b.digest


def test_responses_that_the_policy_has_no_positions_for(home, tmp_path):
    directory = make_gpt2(tmp_path / "gpt2" / "checkpoint-3")
    config = {"checkpoints": [str(directory)], "batch_config": write_pool(home, prompts("1+2=", "300+400="))}
    message = "up to 8 tokens and max_new_tokens of 57 do not fit into the 64 positions.*at most 56"
    refused(ConfigError, message, config_of(home, **config, generation={"max_new_tokens": 57}))
    config["batch_config"] |= {"E_total_sequences": 2}
    finite(probe(config_of(home, **config, generation={"max_new_tokens": 56})))


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generation": {"top_p": 0.95}}, r"top_p: it is 0\.95.*Set top_p: 1\.0"),
        ({"importance": {"etas": [0, math.nan]}}, "importance.etas.1"),
        ({"importance": {"etas": []}}, "importance.etas"),
        ({"importance": {"etas": [0.3, 1, 0.3]}}, "listed twice"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"update": {"optimizer": {"lr": 1}}}, "update.optimizer: unknown key"),
        ({"checkpoints": []}, "checkpoints: "),
    ],
)
def test_a_configuration_that_is_not_understood(home, sections, message):
    refused(ConfigError, message, config_of(home, **sections))


def test_a_file_that_is_no_configuration(home):
    (home / "probe.yaml").write_text("checkpoints: [")
    for path in ("probe.yaml", "missing.yaml"):
        with pytest.raises(ConfigError) as raised:
            preflight(load_config(home / path))
        one_line(raised.value)
