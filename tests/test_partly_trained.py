"""An optimizer of some parameters of the model: who they are, and that the others stay where they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import HYPERPARAMETERS, by_name, edit_optimizer, make_model, train, write
from lora_fixtures import make_base, save_adapter, with_adapter, write_json
from peft.optimizers import create_loraplus_optimizer
from pipeline_fixtures import train as train_on_problems
from pipeline_fixtures import trainer_groups
from transformers import AutoModelForCausalLM

from entropy_core.checkpoints.checkpoint import Checkpoint, read_checkpoint
from entropy_core.checkpoints.partly_trained import only_choice
from entropy_core.errors import CheckpointError

ALL = [name for name, _ in make_model().named_parameters()]
FROZEN = {
    "the embedding": ("embed_tokens",),
    "all but the last layer and the head": ("embed_tokens", "layers.0"),
    "feed-forward layers": ("mlp",),
    "queries": ("q_proj",),
}


def partly_trained(run: Path, frozen: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Checkpoints after 3 and 6 steps, and the truth about the second."""
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    for step in (3, 6):
        train(model, optimizer)
        write(run / f"checkpoint-{step}", model, optimizer, step)
    return run / "checkpoint-6", by_name(model, optimizer)


def require(checkpoint: Checkpoint, truth: dict[str, Any]) -> None:
    """The slots have these names, all others have none, and that is said."""
    optimizer = checkpoint.optimizer
    assert sorted(name for group in optimizer.groups for name in group.names) == sorted(truth)
    assert sorted([*truth, *optimizer.unmoved]) == sorted(checkpoint.parameter_shapes)
    for name, slot in truth.items():
        assert torch.equal(optimizer.moments["exp_avg"][name], slot["exp_avg"])
    count = f"does not move {len(optimizer.unmoved)} of {len(checkpoint.parameter_shapes)} parameters"
    assert any(count in said for said in checkpoint.assumptions)


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_are_known_by_shapes_or_by_another_checkpoint(tmp_path: Path, frozen: str) -> None:
    directory, truth = partly_trained(tmp_path, FROZEN[frozen])
    assert 0 < len(truth) < len(ALL)
    checkpoint = read_checkpoint(directory)
    require(checkpoint, truth)
    by_shape = frozen in ("the embedding", "feed-forward layers")
    assert any(("their shapes" if by_shape else "those of checkpoint-3") in said for said in checkpoint.assumptions)


def test_what_cannot_be_told_is_refused_and_can_be_said(tmp_path: Path) -> None:
    directory, truth = partly_trained(tmp_path, FROZEN["queries"])
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"14 \+ 5 parameters, the model has 16 \+ 5.*side by side"):
        read_checkpoint(directory)
    in_order = [n for n in truth if "norm" not in n] + [n for n in truth if "norm" in n]
    (directory / "optimizer_param_names.json").write_text(json.dumps(in_order))
    require(read_checkpoint(directory), truth)


def test_a_listed_parameter_without_a_slot_does_not_move(sound: Path) -> None:
    edit_optimizer(sound, lambda saved: saved["state"].pop(1))
    checkpoint = read_checkpoint(sound)
    assert checkpoint.optimizer.unmoved == ("model.layers.0.self_attn.q_proj.weight",)
    assert "does not move 1 of 21 parameters" in " ".join(checkpoint.assumptions)


def test_a_choice_is_made_only_where_there_is_one() -> None:
    shape_of = {"a": (2,), "b": (3,), "c": (2,), "d": (4,)}
    assert only_choice([(2,), (3,)], "abcd", shape_of) == ["a", "b"]
    assert only_choice([(3,), (2,)], "abcd", shape_of) == ["b", "c"]
    assert only_choice([(2,), (4,)], "abcd", shape_of) == []  # a or c
    assert only_choice([(4,), (2,)], "abcd", shape_of) == []
    assert only_choice([None, (3,), None, None], "abcd", shape_of) == ["a", "b", "c", "d"]


def test_the_groups_of_lora_plus(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    targets = ["c_attn", "wte"]
    model = with_adapter(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), target_modules=targets, bias="lora_only"
    )
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [1, 2, 1, 1]
    truth = {name: p for name, p in model.named_parameters() if p.requires_grad}
    *_, (step, optimizer) = train_on_problems(model, 2, optimizer=optimizer)
    directory = tmp_path / "checkpoint-2"
    save_adapter(model, directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    write_json(directory / "trainer_state.json", {"global_step": step})

    found = read_checkpoint(directory).optimizer
    assert found.learning_rate == 16e-3
    for group, params in zip(found.groups, (group["params"] for group in groups), strict=True):
        assert len(group.names) == len(params)
        for name, parameter in zip(group.names, params, strict=True):
            assert truth["base_model.model." + name] is parameter
    rates = [group.hyperparameters.relative_lr for group in found.groups]
    assert rates == pytest.approx([1 / 16, 1e-6 / 16e-3, 1, 1])
