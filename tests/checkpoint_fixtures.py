"""A small Llama's checkpoint, as the Trainer groups its parameters, and edits of its files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import trainer_groups
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.checkpoints import checkpoint as checkpoints
from entropy_core.checkpoints.checkpoint import read_checkpoint

HYPERPARAMETERS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7}
STEPS = 3
EMBEDDING = "model.embed_tokens.weight"


def make_model(tie_word_embeddings: bool = False, **changes) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tie_word_embeddings,
        **changes,
    )
    return LlamaForCausalLM(config)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        ids = torch.randint(0, 24, (4, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write(directory: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int = STEPS) -> Path:
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return directory


def by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def assert_same_state(
    directory: Path, truth: dict[str, dict[str, torch.Tensor]], learning_rate: float | None = None
) -> checkpoints.Checkpoint:
    checkpoint = read_checkpoint(directory, learning_rate)
    optimizer = checkpoint.optimizer
    assert list(checkpoint.parameter_shapes) == list(truth)
    assert sorted(name for group in optimizer.groups for name in group.names) == sorted(truth)
    for name, slot in truth.items():
        assert checkpoint.parameter_shapes[name] == tuple(slot["exp_avg"].shape)
        assert optimizer.step[name] == int(slot["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.moments[key][name], slot[key], rtol=0, atol=0)
    # The comparison can fail: no two parameters of one shape have the same moments.
    moments = list(optimizer.moments["exp_avg"].values())
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(moments) for b in moments[:i])
    return checkpoint


@pytest.fixture(scope="session")
def original_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the Trainer groups it, without names."""
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    return write(tmp_path_factory.mktemp("run") / "checkpoint-3", model, optimizer)


@pytest.fixture
def sound(original_checkpoint: Path, tmp_path: Path) -> Path:
    """The original's copy, to break."""
    return Path(shutil.copytree(original_checkpoint, tmp_path / original_checkpoint.name))


def edit_optimizer(directory: Path, change: Callable[[dict], object]) -> None:
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, directory / "optimizer.pt")


def set_group(key: str, *values: object) -> Callable[[dict], None]:
    def change(saved: dict) -> None:
        for group, value in zip(saved["param_groups"], values, strict=True):
            group[key] = value

    return change


class RunsCode:
    """Unpickled, it makes a directory."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size // 2)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def optimizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda directory: edit_optimizer(directory, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return tensors_of("model.safetensors", change)


def tensors_of(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = {key: tensor.clone() for key, tensor in load_file(directory / name).items()}
        change(state)
        save_file(state, directory / name, {"format": "pt"})

    return edit
