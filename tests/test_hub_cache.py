"""Models by their names on the hub: from the cache of this machine, and never from the network."""

import json
import os
import shutil
from pathlib import Path

import pytest
from lora_fixtures import make_base, make_lora

from entropy_core.checkpoints.layout import find_layout
from entropy_core.config.paths import Origin
from entropy_core.config.read import parse_config
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.files.checkpoint import weights_digest
from entropy_core.files.hub_cache import cached_snapshot

NAME, COMMIT = "lab/tiny", "0123abc"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model in the hub cache, as links to blobs; returns the model that it is a copy of."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, top = make_base(tmp_path / "base"), tmp_path / "hub" / "models--lab--tiny"
    snapshot = top / "snapshots" / COMMIT
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    shutil.copytree(model, top / "blobs")
    for file in (top / "blobs").iterdir():
        os.symlink(file, snapshot / file.name)
    return model


def named(tmp_path: Path, base: Path, name: str, revision: str | None) -> Path:
    checkpoint = make_lora(tmp_path / "checkpoint-3", base)
    path = checkpoint / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(said))
    return checkpoint


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_base_that_an_adapter_names_is_found_in_the_cache(tmp_path: Path, base: Path, revision: str | None):
    found = find_layout(named(tmp_path, base, NAME, revision)).base
    assert found == tmp_path / "hub" / "models--lab--tiny" / "snapshots" / COMMIT
    assert weights_digest(found) == weights_digest(base)


@pytest.mark.parametrize(
    ("name", "revision"), [(NAME, "other"), (NAME, "../main"), ("lab/other", None), ("../tiny", None)]
)
def test_another_one_is_not(tmp_path: Path, base: Path, name: str, revision: str | None):
    with pytest.raises(
        CheckpointError, match=r"not on this machine: it names .*nor in the hub cache.*nothing is downl"
    ):
        find_layout(named(tmp_path, base, name, revision))


@pytest.mark.parametrize("long", ["9" * 300, f"lab/{'x' * 4000}"])
def test_a_name_that_no_file_can_have_is_not_there(tmp_path: Path, base: Path, long: str):
    assert cached_snapshot(long, "models") is None
    assert cached_snapshot(NAME, "models", revision="r" * 5000) is None
    assert cached_snapshot(NAME, "models") is not None
    with pytest.raises(ConfigError):
        parse_config({"checkpoints": [str(tmp_path)], "policy": {"base_model": long}}, origin=Origin(tmp_path, True))


def test_a_configuration_may_name_a_model_of_the_cache(tmp_path: Path, base: Path):
    (tmp_path / "checkpoint-3").mkdir()
    origin = Origin(tmp_path, must_exist=True)
    asked = {"checkpoints": ["checkpoint-3"], "policy": {"base_model": NAME}, "update": {"reference": "base"}}
    config = parse_config(asked, origin=origin)
    assert config.policy.base_model == str(tmp_path / "hub" / "models--lab--tiny" / "snapshots" / COMMIT)
    assert config.update.reference == str(base)
    with pytest.raises(
        ConfigError, match=r"policy\.base_model: there is no directory .*, and no model lab/other in the hub"
    ):
        parse_config(asked | {"policy": {"base_model": "lab/other"}}, origin=origin)
