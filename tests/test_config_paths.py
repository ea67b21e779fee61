"""Paths start at the folder of the file that names them, and one that leads nowhere is found before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_core.config.paths import Origin
from entropy_core.config.read import load_config, parse_config, parse_request
from entropy_core.errors import ConfigError
from entropy_core.files.checkpoint import find_checkpoints

NAMED: dict[str, Any] = {
    "checkpoints": ["../runs/checkpoint-*", "~/one"],
    "policy": {"base_model": "base"},
    "batch_config": {"dataset_name": "pool.jsonl", "dataset_path": "copies/gsm8k"},
    "update": {"reference": "base", "kl_beta": 0.1, "reward": "../rewards.py:exact"},
    "execution": {"artifacts": "../store"},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that `NAMED` names, and a current folder that has nothing of it."""
    for folder in ("runs/checkpoint-1", "user/one", "configs/base", "configs/copies/gsm8k", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs" / "pool.jsonl").touch()
    (tmp_path / "rewards.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(home: Path, values: dict[str, Any]) -> Path:
    path = home / "configs" / "probe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("relative", [False, True])
def test_every_path_starts_at_the_folder_of_the_file(home, relative):
    path = write(home, NAMED)
    config = load_config("../configs/probe.yaml" if relative else path, must_exist=True)
    assert config.checkpoints == [str(home / "runs" / "checkpoint-*"), str(home / "user" / "one")]
    assert config.policy.base_model == config.update.reference == str(home / "configs" / "base")
    assert config.batch_config.dataset_name == str(home / "configs" / "pool.jsonl")
    assert config.batch_config.dataset_path == str(home / "configs" / "copies" / "gsm8k")
    assert config.update.reward == f"{home}/rewards.py:exact"
    assert config.store_root == home / "store"
    assert load_config(write(home, config.model_dump(mode="json")), must_exist=True) == config


def test_what_is_no_path_stays_as_it_is(home):
    config = load_config(write(home, {"checkpoints": ["../runs/checkpoint-1"]}), must_exist=True)
    assert (config.batch_config.dataset_name, config.update.reward) == ("arithmetic", "exact_match")
    assert config.policy.base_model == config.update.reference == config.batch_config.dataset_path == ""
    module = NAMED | {"update": {"reward": "package.module:function"}, "batch_config": {"dataset_name": "gsm9k"}}
    config = load_config(write(home, module), must_exist=True)
    assert (config.batch_config.dataset_name, config.update.reward) == ("gsm9k", "package.module:function")


def test_the_store_is_beside_the_file_unless_it_says_otherwise(home):
    for values in (NAMED | {"execution": {}}, {name: NAMED[name] for name in NAMED if name != "execution"}):
        assert load_config(write(home, values)).store_root == home / "configs" / "artifacts"


def test_values_without_a_file_stay_or_start_where_they_are_told_to(home):
    named = NAMED | {"update": NAMED["update"] | {"reward": [NAMED["update"]["reward"]]}}  # as a form has it
    assert parse_config(NAMED).model_dump(mode="json", exclude_unset=True) == named
    assert parse_config(named).update.reward == NAMED["update"]["reward"]
    config = parse_config(NAMED, origin=Origin(home / "configs"))
    assert config == load_config(write(home, NAMED))
    assert parse_config(config, origin=Origin(home)) == config
    assert parse_request({}).artifacts == "artifacts"
    assert parse_request({"artifacts": "../a"}, Origin(home / "configs")).artifacts == str(home / "a")
    again = parse_request(parse_request({"cluster": "auto"}), Origin(home))
    assert (again.cluster, again.baseline, again.artifacts) == ("auto", "as_recorded", str(home / "artifacts"))


def test_every_path_that_leads_nowhere_is_named(home):
    lost = {
        "checkpoints": ["../runs/checkpoint-1", "../runs/step-*", "gone"],
        "policy": {"base_model": "no-base"},
        "batch_config": {"dataset_name": "no.parquet", "dataset_path": "pool.jsonl"},
        "update": {"reference": "no-reference", "kl_beta": 0.1, "reward": "no.py:exact"},
        "execution": {"artifacts": "pool.jsonl"},
    }
    path = write(home, lost)
    configs = home / "configs"
    assert load_config(path).policy.base_model == str(configs / "no-base")
    with pytest.raises(ConfigError) as raised:
        load_config(path, must_exist=True)
    assert str(raised.value).splitlines() == [
        f"{path} has 8 errors:",
        f"  checkpoints.1: no directory matches {home}/runs/step-*; a run's checkpoints are usually RUN/checkpoint-*",
        f"  checkpoints.2: no directory matches {configs}/gone; a run's checkpoints are usually RUN/checkpoint-*",
        f"  policy.base_model: there is no directory {configs}/no-base, and no model no-base in the hub cache",
        f"  batch_config.dataset_name: there is no file {configs}/no.parquet",
        f"  batch_config.dataset_path: there is no directory {configs}/pool.jsonl",
        f"  update.reference: there is no directory {configs}/no-reference, and no model no-reference in the hub cache",
        f"  update.reward: there is no file {configs}/no.py",
        f"  execution.artifacts: {configs}/pool.jsonl is a file, and the store is a folder.",
        "Fix: correct them; docs/configuration.md lists all keys.",
    ]


@pytest.mark.parametrize("folder", ["run [1]", "run*", "run?", "run:1"])
def test_a_folder_with_the_characters_of_a_pattern_is_that_folder(tmp_path, folder):
    """Letters in the folder of the file, a pattern in what the file says; a directory of that very name comes first."""
    for name in (folder, "run 1", "runs"):
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
        (tmp_path / name / "checkpoint-[2]").mkdir()
    path = tmp_path / folder / "probe.yaml"
    path.write_text("checkpoints: ['checkpoint-?', 'checkpoint-[2]']\nupdate: {reward: 'r.py:f'}\n")
    (tmp_path / folder / "r.py").touch()
    config = load_config(path, must_exist=True)
    assert parse_config(config, origin=Origin(tmp_path, must_exist=True)).update.reward == f"{path.parent}/r.py:f"
    found = find_checkpoints(config.checkpoints)
    assert found == [tmp_path / folder / "checkpoint-1", tmp_path / folder / "checkpoint-[2]"]
