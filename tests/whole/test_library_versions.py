"""Releases of libraries are in the key, and one sweep never mixes two of them."""

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import Counting, make_run, probe, skip_figures, values

from entropy_core.code import library_versions
from entropy_core.code.identity import code_of
from entropy_core.code.library_versions import compared, release
from entropy_core.config.read import parse_config
from entropy_core.errors import StoreError
from entropy_core.pipeline.catalogue import STAGES
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.store.store import Stage, Store


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", "2.13"), ("5.23.1", "5.23"), ("5.24.0.dev0", "5.24"), ("3", "3"), ("unknown", "unknown")],
)
def test_a_release_is_a_major_and_a_minor_number(monkeypatch, version, expected):
    monkeypatch.setattr("torch.__version__", version)
    assert release("torch") == expected


def test_what_is_loaded_counts_and_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(
        library_versions.importlib.metadata, "version", lambda name: pytest.fail(f"{name} was looked up")
    )
    monkeypatch.setattr("torch.__version__", "9.8.7")
    assert compared(["json", "pyarrow"]) == {"torch": "9.8"}
    monkeypatch.undo()
    assert release("no_such_library") == ""


def test_each_stage_is_compared_by_the_libraries_that_it_uses():
    libraries = {stage.name: set(compared(code_of(stage.function).libraries)) for stage in STAGES}
    of_the_model = {"torch", "transformers", "tokenizers", "safetensors", "jinja2"}
    assert libraries["reward-u-batch"] == {"torch"}
    assert libraries["variance"] == libraries["report"] == {"torch", "numpy", "scipy"}
    assert libraries["load-prompts"] == of_the_model | {"datasets"}
    assert libraries["load-checkpoint"] == of_the_model | {"peft"}
    for stage in ("sample-e-batch", "score-e-batch", "entropy-gradient", "compute-update", "path-integral"):
        assert libraries[stage] == of_the_model | {"peft"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("versions") / "run")


class Stopped(Exception):
    pass


def half_of(config: dict[str, Any]) -> Counting:
    """A sweep that is stopped in the middle of the second checkpoint."""
    parsed = parse_config(config)
    checkpoints = preflight(parsed)
    store = Store(parsed.store_root)
    run = Counting(store, execution_for(parsed, checkpoints))

    def stopping(stage: Stage, inputs: dict[str, Any], label: str):
        if stage.name == "first-order-e" and run.computed[stage.name] == 3:
            raise Stopped
        return run(stage, inputs, label)

    with pytest.raises(Stopped):
        sweep(parsed, checkpoints, store, Runner(stopping))
    return run


def test_a_half_finished_sweep_is_not_continued_with_another_release(run, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    config = values(run, tmp_path / "artifacts")
    half = half_of(config)
    before = half.store.names()
    installed = release("transformers")
    with monkeypatch.context() as upgraded:
        upgraded.setattr("transformers.__version__", "99.1.0")
        with pytest.raises(StoreError) as caught:
            probe(config)
        assert half.store.names() == before, "it is refused before any work"
        assert f"were made with transformers {installed}, and here is transformers 99.1" in caught.value.fact
        for way in (f"install transformers {installed} again", "adopt CONFIG", "library_versions: recompute"):
            assert way in caught.value.fix

        willing = config | {"execution": config["execution"] | {"library_versions": "recompute"}}
        anew = probe(willing)
        manifests = [artifact.manifest for _, _, artifact in anew.run.asked]
        assert {of["libraries"].get("transformers", "99.1") for of in manifests} == {"99.1"}
        assert not {"load-checkpoint", "load-prompts", "sample-e-batch"} - set(anew.run.was_computed)
        assert set(anew.run.computed) - set(anew.run.was_computed) == {"reward-u-batch"}, "which uses no transformers"
        assert probe(config).run.was_computed == {}, "what is complete needs no permission"

    with pytest.raises(StoreError, match=r"were made with transformers 99\.1"):
        probe(config)
    again = probe(willing)
    manifests = [artifact.manifest for _, _, artifact in again.run.asked]
    assert {of["libraries"].get("transformers", installed) for of in manifests} == {installed}
    found = len(again.run.asked) - sum(again.run.was_computed.values())
    assert found >= len(before), "with the earlier release the sweep goes on where it was"


def test_patches_and_builds_are_no_other_release(run, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    config = values(run, tmp_path / "artifacts", checkpoints=[str(run / "checkpoint-3")])
    probe(config)
    monkeypatch.setattr("torch.__version__", f"{release('torch')}.99+cu128")
    monkeypatch.setattr("transformers.__version__", f"{release('transformers')}.99")
    assert probe(config).run.was_computed == {}


def upgrade(out, execution):
    execution.setattr("torch.__version__", "77.0.0")
    return {}


def test_a_library_that_is_upgraded_under_a_stage_makes_no_result(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="a library was upgraded, during the run"):
        store.run(Stage("upgrade", upgrade), monkeypatch, {})
    assert store.names() == []
