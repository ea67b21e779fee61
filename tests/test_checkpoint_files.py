"""Checkpoints are found by their patterns, and known by the content of the files that determine results."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from checkpoint_fixtures import EMBEDDING, optimizer, tensors, text

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.errors import CheckpointError
from entropy_core.files import checkpoint as checkpoint_files
from entropy_core.files import digests as digests_of_files
from entropy_core.files.checkpoint import (
    checkpoint_digest,
    file_digests,
    find_checkpoints,
    tokenizer_digest,
    weights_digest,
)
from entropy_core.files.digests import file_digest


def test_checkpoints_are_found_by_step_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/checkpoint-100", "a/checkpoint-20", "b/checkpoint-3", "a/checkpoint-best", "b[1]/checkpoint-7"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/checkpoint-notes.txt").touch()
    monkeypatch.chdir(tmp_path)

    def found(*patterns: str) -> list[str]:
        return [path.resolve().relative_to(tmp_path.resolve()).as_posix() for path in find_checkpoints(patterns)]

    a = ["a/checkpoint-20", "a/checkpoint-100", "a/checkpoint-best"]
    assert found("a/checkpoint-*") == found(f"{tmp_path}/a/checkpoint-*") == a
    assert found("a/checkpoint-*", str(tmp_path / "a/checkpoint-20"), "./a/../a/checkpoint-100/") == a
    assert found("**/checkpoint-*", "b/*")[:2] == ["b/checkpoint-3", "b[1]/checkpoint-7"]
    assert found("b[1]/checkpoint-7") == ["b[1]/checkpoint-7"]
    for nothing in ("c/*", "a/*.txt"):
        with pytest.raises(CheckpointError, match="No directory matches"):
            find_checkpoints(["a/checkpoint-20", nothing])


def test_a_run_directory_stands_for_its_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-20", "checkpoint-3", "checkpoint-3/checkpoint-1", "checkpoint-best", "checkpoint-4.tmp"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-7").touch()
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").touch()
    (tmp_path / "run" / "config.json").touch()  # of the last model, which a trainer saves beside them
    found = [tmp_path / "run" / name for name in ("checkpoint-3", "checkpoint-20")]
    for patterns in ([f"{tmp_path}/run"], [f"{tmp_path}/*"], [f"{tmp_path}/run/checkpoint-3", f"{tmp_path}/run"]):
        assert find_checkpoints(patterns) == found
    (tmp_path / "run" / "optimizer.pt").touch()  # it is one itself
    assert find_checkpoints([f"{tmp_path}/run"]) == [tmp_path / "run"]


def test_digests_are_of_the_files_that_determine_results(sound: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "merges.txt",
        "tekken.json",
        "spiece.model",
        "qwen.tiktoken",
        "unheard-of",
    ):
        (sound / name).write_text(name)
    bystanders = ("training_args.bin", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "README.md", ".DS_Store")
    for name in (*bystanders, "events.out.tfevents.17.host", "zero_to_fp32.py", "eval_results.json"):
        (sound / name).write_text(name)
    (sound / "additional_chat_templates").mkdir()
    (sound / "additional_chat_templates/tools.jinja").write_text("tools")
    digests = file_digests(sound)
    assert list(digests) == sorted(digests)
    assert set(digests) == {
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "optimizer.pt",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "unheard-of",
    }
    for name, digest in digests.items():
        assert digest == hashlib.sha256((sound / name).read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="no directory"):
        file_digests(sound / "nowhere")


def test_a_file_is_hashed_once_until_it_changes(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = digests_of_files.hashlib.file_digest

    def counted(file, name):
        hashed.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(digests_of_files.hashlib, "file_digest", counted)
    monkeypatch.setattr(digests_of_files, "SETTLED_NS", 0)
    first = file_digests(sound)
    assert sorted(hashed) == list(first)
    hashed.clear()
    assert file_digests(sound) == first and not hashed
    (sound / "trainer_state.json").write_text('{"global_step": 9}')
    second = file_digests(sound)
    assert hashed == ["trainer_state.json"]
    assert {name for name in first if first[name] != second[name]} == {"trainer_state.json"}


def test_a_digest_is_of_the_content_wherever_it_lies(sound: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(sound, tmp_path / "elsewhere"))
    (elsewhere / "README.md").write_text("not a file that counts")
    for digest in (checkpoint_digest, weights_digest):
        assert digest(elsewhere) == digest(sound) and len(digest(sound)) == 64
    assert checkpoint_digest(sound) != weights_digest(sound)
    name = "model.safetensors"
    assert file_digest(elsewhere / name) == file_digest(sound / name) == file_digests(sound)[name]
    for digest in (checkpoint_digest, weights_digest):
        with pytest.raises(CheckpointError, match="no directory"):
            digest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (optimizer(lambda s: s["state"][0]["exp_avg"].mul_(2)), True),
        (tensors(lambda s: s[EMBEDDING].mul_(2)), True),
        (text("generation_config.json", '{"eos_token_id": 2}'), True),
        (text("tokenizer.json", "{}"), False),
        (text("tekken.json", "{}"), False),
        (text("spiece.model", "x"), False),
        (text("config.json", "{}"), False),
    ],
)
def test_the_tokenizer_digest_is_of_all_that_a_tokenizer_may_be_made_of(
    sound: Path, edit: Callable[[Path], object], same: bool
) -> None:
    before = tokenizer_digest(sound)
    edit(sound)
    assert (tokenizer_digest(sound) == before) is same


@pytest.mark.parametrize(
    ("edit", "same_policy"),
    [
        (optimizer(lambda s: s["state"][0]["exp_avg"].mul_(2)), True),
        (text("trainer_state.json", '{"global_step": 9}'), True),
        (tensors(lambda s: s[EMBEDDING].mul_(2)), False),
        (text("chat_template.jinja", "{{ messages }}"), False),
        (text("tiktoken.model", "x"), False),
    ],
    ids=["optimizer", "trainer state", "weights", "chat template", "another tokenizer"],
)
def test_the_weights_digest_leaves_the_trainer_out(
    sound: Path, edit: Callable[[Path], object], same_policy: bool
) -> None:
    before = checkpoint_digest(sound), weights_digest(sound)
    edit(sound)
    assert checkpoint_digest(sound) != before[0]
    assert (weights_digest(sound) == before[1]) is same_policy


def test_an_unreadable_file_is_named(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_files, "file_digest", fail)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*Permission denied"):
        file_digests(sound)


def test_files_are_digested_without_torch() -> None:
    modules = "entropy_core.checkpoints.content, entropy_core.files.checkpoint"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_are_frozen(sound: Path) -> None:
    checkpoint = read_checkpoint(sound)
    for record in (checkpoint, checkpoint.optimizer, checkpoint.optimizer.groups[0]):
        with pytest.raises(AttributeError):
            setattr(record, fields(record)[0].name, None)
