"""The demo run: what a trainer's checkpoint holds, and that a run is found, remade or left alone as it should be."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from entropy_core.demo import run as demo
from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer, make_demo_run
from entropy_core.errors import ConfigError, ProbeError, StoreError
from entropy_core.prompts.arithmetic import CHARACTERS, problems

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

TINY = DemoSettings(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=32,
    warm_problems=64,
    warm_steps=4,
    warm_batch=8,
    prompts=8,
    prompts_per_step=2,
    generations=4,
    max_new_tokens=8,
    steps=4,
    save_every=2,
)


@pytest.fixture(scope="module")
def looked_up():
    """The host names that the run asked for."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, looked_up):
    def refuse(host, *_, **__):
        looked_up.append(host)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.delenv("CI", raising=False)  # trl reports runs only outside CI
        return make_demo_run(tmp_path_factory.mktemp("demo") / "run", TINY)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training by a note that it was asked for."""
    calls = []

    def train(partial, settings):
        calls.append(settings)
        (partial / "checkpoint-1").mkdir()
        return {}

    monkeypatch.setattr(demo, "_train", train)
    return calls


@needs_trl
def test_the_checkpoints_are_what_a_trainer_leaves(run):
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-2", "checkpoint-4", "demo.json", "entropy-probe.yaml"]
    for step in (2, 4):
        there = {p.name for p in (run / f"checkpoint-{step}").iterdir()}
        assert there >= {
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "optimizer.pt",
            "trainer_state.json",
        }


@needs_trl
def test_the_optimizer_has_a_decay_group_and_then_a_group_without(run):
    state = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    weights = load_file(run / "checkpoint-4" / "model.safetensors")
    decay, plain = state["param_groups"]
    assert (decay["weight_decay"], plain["weight_decay"]) == (TINY.weight_decay, 0.0)
    assert decay["lr"] == plain["lr"] == TINY.learning_rate > 0
    assert decay["params"] + plain["params"] == list(range(len(weights)))

    # slots follow named_parameters() within each group; here every norm is outside the decay, and nothing else
    names = [name for name, _ in build_model(TINY).named_parameters()]
    ordered = [n for n in names if "norm" not in n] + [n for n in names if "norm" in n]
    assert len(plain["params"]) == sum("norm" in n for n in names) == 2 * TINY.layers + 1
    assert [state["state"][i]["exp_avg"].shape for i in range(len(ordered))] == [weights[n].shape for n in ordered]
    assert {int(slot["step"]) for slot in state["state"].values()} == {4}


@needs_trl
def test_the_head_is_a_parameter_of_its_own_and_the_weights_are_float32(run):
    weights = load_file(run / "checkpoint-4" / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights.keys()
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert {w.dtype for w in weights.values()} == {torch.float32}


@needs_trl
def test_the_generation_config_leaves_the_law_alone(run):
    saved = json.loads((run / "checkpoint-4" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["eos_token_id"] == 1
    assert saved["pad_token_id"] == 0
    assert not saved.keys() & {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


@needs_trl
def test_the_manifest_tells_what_happened_at_each_checkpoint(run):
    manifest = json.loads((run / demo.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["settings"] == dataclasses.asdict(TINY)
    assert [row["step"] for row in manifest["checkpoints"]] == [2, 4]
    for row in manifest["checkpoints"]:
        assert row.keys() == {"step", "reward", "entropy", "zero_variance_groups", "mean_length", "grad_norm"}
    assert manifest["parameters"] == sum(p.numel() for p in build_model(TINY).parameters())


@needs_trl
def test_nothing_is_looked_up_on_the_network(run, looked_up):
    assert looked_up == []


@needs_trl
def test_the_same_settings_give_the_same_weights(run, tmp_path):
    before = torch.get_rng_state(), torch.get_num_threads()
    again = make_demo_run(tmp_path / "again", TINY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    for step in (2, 4):
        first, second = (load_file(r / f"checkpoint-{step}" / "model.safetensors") for r in (run, again))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["again"]


@needs_trl
def test_a_second_call_does_nothing(run, trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert make_demo_run(run, TINY) == run
    assert "nothing to do" in capsys.readouterr().out
    assert trained == []
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@needs_trl
def test_finding_a_run_imports_no_heavy_library(run):
    script = (
        "import sys; from entropy_core.demo.run import DemoSettings, make_demo_run;"
        f"make_demo_run({str(run)!r}, {TINY!r});"
        "print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@needs_trl
@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: (run / demo.MANIFEST).unlink(),
        lambda run: (run / demo.MANIFEST).write_text("{", encoding="utf-8"),
        lambda run: (run / "checkpoint-4" / "optimizer.pt").unlink(),
        lambda run: (run / "checkpoint-2" / "model.safetensors").write_bytes(b"short"),
        lambda run: shutil.rmtree(run / "checkpoint-2"),
    ],
    ids=["no manifest", "broken manifest", "file missing", "file short", "checkpoint missing"],
)
def test_a_half_written_run_is_made_again(copy, trained, spoil):
    spoil(copy)
    make_demo_run(copy, TINY)
    assert trained == [TINY]
    assert sorted(p.name for p in copy.iterdir()) == ["checkpoint-1", "demo.json", "entropy-probe.yaml"]


@needs_trl
def test_a_training_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(partial, settings):
        (partial / "checkpoint-1").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        make_demo_run(tmp_path / "run", TINY)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


@needs_trl
def test_what_a_killed_process_left_is_cleared(tmp_path, trained):
    (tmp_path / ".run.partial" / "checkpoint-7").mkdir(parents=True)
    make_demo_run(tmp_path / "run", TINY)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-1", "demo.json", "entropy-probe.yaml"]
    assert not (tmp_path / ".run.partial").exists()


@needs_trl
def test_a_run_made_otherwise_is_neither_used_nor_deleted(copy, trained):
    with pytest.raises(StoreError, match=r"made with seed 0 and not 1\..*delete that directory"):
        make_demo_run(copy, dataclasses.replace(TINY, seed=1))
    assert trained == []
    assert (copy / "checkpoint-4").is_dir()


@needs_trl
def test_a_directory_of_something_else_is_left_alone(tmp_path, trained, capsys):
    (tmp_path / "thesis.tex").touch()
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "is no demo run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert trained == []


@needs_trl
def test_a_path_that_cannot_be_written_is_told(tmp_path, trained):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        make_demo_run(tmp_path / "file" / "run", TINY)


def test_a_missing_trl_is_told_with_the_way_out(tmp_path, monkeypatch):
    installed = importlib.metadata.version

    def version(name):
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ProbeError, match=r"needs trl, which is not installed.*pip install -e '\.\[trl\]'"):
        make_demo_run(tmp_path / "run", TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"heads": 3}, "3 heads do not divide its hidden size 16"),
        ({"save_every": 5}, "would save no checkpoint"),
        ({"generations": 1}, "one response per prompt"),
    ],
)
def test_settings_that_make_no_run_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)


def test_the_tokenizer_gives_back_every_text():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(CHARACTERS) + 2
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    for text in [CHARACTERS, *(p["prompt"] + p["solution"] for p in problems("train", 50))]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert (
            tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
        )


def test_the_tokenizer_pads_on_the_left_and_refuses_other_characters():
    tokenizer = build_tokenizer()
    batch = tokenizer(["1+2=", "11+2="], padding=True)
    assert batch["attention_mask"][0] == [0, 1, 1, 1, 1]
    assert set(batch) == {"input_ids", "attention_mask"}
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("one")


@needs_trl
def test_the_saved_tokenizer_is_the_same(run):
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(run / "checkpoint-4")
    fresh = build_tokenizer()
    text = "12+345=" + CHARACTERS
    assert saved(text)["input_ids"] == fresh(text)["input_ids"]
    assert (saved.pad_token_id, saved.eos_token_id, saved.padding_side) == (0, 1, "left")


def test_the_model_is_drawn_from_its_seed_alone():
    torch.manual_seed(5)
    first, second = build_model(TINY), build_model(TINY)
    other = build_model(dataclasses.replace(TINY, seed=1))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
