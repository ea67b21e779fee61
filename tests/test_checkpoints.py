"""Checkpoints are real files: a small random Llama saved by transformers, torch's AdamW after steps on real gradients.

The truth about names is `optimizer.state[parameter]`: keyed by the parameter itself, it knows nothing of order.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoint_fixtures import (
    HYPERPARAMETERS,
    assert_same_state,
    by_name,
    edit_optimizer,
    make_model,
    set_group,
    train,
    write,
)
from pipeline_fixtures import trainer_groups

from entropy_core.checkpoints.architecture import NO_DECAY_PATTERNS
from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.optimizer_state import OptimizerState
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.files.checkpoint import find_checkpoints

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_names_follow_the_trainers_groups(tmp_path: Path, tied: bool) -> None:
    model = make_model(tied)
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    checkpoint = assert_same_state(write(tmp_path / "checkpoint-3", model, optimizer), by_name(model, optimizer))

    assert ("lm_head.weight" in checkpoint.parameter_shapes) is not tied
    decay, no_decay = checkpoint.optimizer.groups
    assert (decay.hyperparameters.weight_decay, no_decay.hyperparameters.weight_decay) == (0.1, 0.0)
    assert all("norm" in name for name in no_decay.names) and len(no_decay.names) == 5
    shared = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-7, "relative_lr": 1.0, "decoupled": True}
    for group in (decay, no_decay):
        found = group.hyperparameters._asdict()
        assert found == shared | {"weight_decay": found["weight_decay"], "amsgrad": False, "maximize": False}
    assert checkpoint.optimizer.learning_rate == 3e-3
    assert (checkpoint.name, checkpoint.step) == ("checkpoint-3", 3)
    assert len(checkpoint.assumptions) == 1 and "Trainer's" in checkpoint.assumptions[0]


def rates_of(optimizer: OptimizerState) -> list[float]:
    """The learning rate of each group."""
    return [optimizer.learning_rate * group.hyperparameters.relative_lr for group in optimizer.groups]


def test_position_alone_would_be_wrong(sound: Path) -> None:
    """In `named_parameters()` order the saved slots do not even have the right shapes: the order is the groups'."""
    slots = torch.load(sound / "optimizer.pt", weights_only=True)["state"]
    shapes = read_checkpoint(sound).parameter_shapes
    assert [tuple(slot["exp_avg"].shape) for slot in slots.values()] != list(shapes.values())


def test_no_weight_decay_still_means_two_groups(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model, decay=0.0), **HYPERPARAMETERS)
    train(model, optimizer)
    checkpoint = assert_same_state(write(tmp_path / "c", model, optimizer), by_name(model, optimizer))
    assert len(checkpoint.optimizer.groups) == 2


def test_one_group_is_in_the_order_of_the_parameters(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), **HYPERPARAMETERS)
    train(model, optimizer)
    checkpoint = assert_same_state(write(tmp_path / "c", model, optimizer), by_name(model, optimizer))
    assert len(checkpoint.optimizer.groups) == 1
    assert "model.parameters()" in checkpoint.assumptions[0]


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_saved_names_are_used_in_any_order(tmp_path: Path, prefix: str) -> None:
    model = make_model()
    reversed_names = [(prefix + name, p) for name, p in reversed(list(model.named_parameters()))]
    groups: list[dict[str, Any]] = [
        {"params": reversed_names[:5], "lr": 1e-4},
        {"params": reversed_names[5:9]},
        {"params": reversed_names[9:]},
    ]
    optimizer = torch.optim.AdamW(groups, **HYPERPARAMETERS)
    train(model, optimizer)
    checkpoint = assert_same_state(write(tmp_path / "c", model, optimizer), by_name(model, optimizer))
    assert rates_of(checkpoint.optimizer) == pytest.approx([1e-4, 3e-3, 3e-3], rel=1e-15)
    assert checkpoint.optimizer.learning_rate == 3e-3
    assert checkpoint.assumptions == ()


def test_sharded_weights(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    directory = write(tmp_path / "c", model, optimizer)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="2KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert_same_state(directory, by_name(model, optimizer))

    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        read_checkpoint(directory)


def test_the_trainers_own_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class KeepTruth(TrainerCallback):
        """What the running optimizer holds at every save, by name."""

        slots: ClassVar[dict[int, dict]] = {}
        learning_rates: ClassVar[dict[int, float]] = {}

        def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
            slots = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
            self.slots[state.global_step] = {n: {k: v.clone() for k, v in slot.items()} for n, slot in slots.items()}
            self.learning_rates[state.global_step] = optimizer.param_groups[0]["lr"]

    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 24, (9,), generator=generator) for _ in range(16)]
    trainer = Trainer(
        model=make_model(tie_word_embeddings=True),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.05,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[KeepTruth()],
    )
    trainer.train()

    first, last = find_checkpoints([str(tmp_path / "checkpoint-*")])
    assert (last / "training_args.bin").exists()
    assert assert_same_state(first, KeepTruth.slots[2]).step == 2
    assert read_checkpoint(first).optimizer.learning_rate == KeepTruth.learning_rates[2] == pytest.approx(5e-3)

    # The linear schedule has reached 0 at its end: the step to come has no size unless it is given.
    with pytest.raises(CheckpointError, match=r"learning rate 0 .*`learning_rate` .* \(the run's peak was 0\.01\)"):
        read_checkpoint(last)
    checkpoint = assert_same_state(last, KeepTruth.slots[4], learning_rate=1e-2)
    assert [group.hyperparameters.weight_decay for group in checkpoint.optimizer.groups] == [0.05, 0.0]


def test_the_decay_patterns_are_the_trainers() -> None:
    pytest.importorskip("accelerate")
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer
    from transformers.trainer_pt_utils import get_parameter_names

    with_head_norms = Qwen3Config(
        vocab_size=24, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    for model in (make_model(attention_bias=True), Qwen3ForCausalLM(with_head_norms)):
        ours = get_parameter_names(model, [torch.nn.LayerNorm], list(NO_DECAY_PATTERNS))
        assert ours == Trainer.get_decay_parameter_names(None, model)


# --- hyperparameters -------------------------------------------------------------------------------------------------


def test_a_given_learning_rate_keeps_the_ratios(sound: Path) -> None:
    edit_optimizer(sound, set_group("lr", 1e-3, torch.tensor(2.5e-4, dtype=torch.float64)))
    assert rates_of(read_checkpoint(sound).optimizer) == [1e-3, 2.5e-4]
    checkpoint = read_checkpoint(sound, learning_rate=4e-6)
    assert rates_of(checkpoint.optimizer) == pytest.approx([4e-6, 1e-6], rel=1e-12)
    assert checkpoint.optimizer.learning_rate == 4e-6
    assert any("4e-06 in place of the saved 0.001" in line for line in checkpoint.assumptions)


def test_a_learning_rate_after_the_end_of_the_schedule(sound: Path) -> None:
    edit_optimizer(sound, set_group("lr", 0.0, 0.0))
    assert rates_of(read_checkpoint(sound, 2e-6).optimizer) == [2e-6, 2e-6]
    edit_optimizer(sound, set_group("initial_lr", 1e-3, 5e-4))
    assert rates_of(read_checkpoint(sound, 2e-6).optimizer) == pytest.approx([2e-6, 1e-6], rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, -1e-6, math.nan, math.inf])
def test_a_given_learning_rate_is_positive(sound: Path, bad: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        read_checkpoint(sound, bad)


def test_amsgrad_and_plain_adam(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(trainer_groups(model), **HYPERPARAMETERS, amsgrad=True, maximize=True)
    train(model, optimizer)
    checkpoint = read_checkpoint(write(tmp_path / "c", model, optimizer))
    for name, slot in by_name(model, optimizer).items():
        torch.testing.assert_close(
            checkpoint.optimizer.moments["max_exp_avg_sq"][name], slot["max_exp_avg_sq"], rtol=0, atol=0
        )
    found = [group.hyperparameters for group in checkpoint.optimizer.groups]
    assert all(of_one.amsgrad and of_one.maximize and not of_one.decoupled for of_one in found)


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}, {"fused": True, "amsgrad": True}], ids=str)
def test_the_variants_of_torchs_adamw_hold_the_same_state(tmp_path: Path, kernel: dict[str, bool]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS, **kernel)
    train(model, optimizer)
    directory = write(tmp_path / "c", model, optimizer)
    checkpoint = assert_same_state(directory, by_name(model, optimizer))
    assert ("max_exp_avg_sq" in checkpoint.optimizer.moments) == ("amsgrad" in kernel)
    # A capturable optimizer, which needs a GPU to make a step, saves its learning rate as a tensor, too.
    rate = torch.tensor(3e-3)
    edit_optimizer(directory, set_group("lr", rate, rate))
    edit_optimizer(directory, set_group("capturable", True, True))
    assert_same_state(directory, by_name(model, optimizer))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_narrow_weights_are_said_and_their_moments_kept_as_saved(tmp_path: Path, moments: torch.dtype) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    for slot in optimizer.state.values():
        slot.update({key: slot[key].to(moments) for key in ("exp_avg", "exp_avg_sq")})
    truth = by_name(model, optimizer)
    directory = write(tmp_path / "c", model.to(torch.bfloat16), optimizer)
    checkpoint = assert_same_state(directory, truth)
    assert {m.dtype for m in checkpoint.optimizer.moments["exp_avg"].values()} == {moments}
    assert "Weights are saved as BF16 and widened to policy.dtype" in checkpoint.assumptions[0]


def test_what_the_files_do_not_say_is_an_assumption(sound: Path) -> None:
    edit_optimizer(sound, lambda saved: [group.pop("decoupled_weight_decay") for group in saved["param_groups"]])
    edit_optimizer(sound, lambda saved: saved["state"][0]["step"].fill_(2))
    config = json.loads((sound / "config.json").read_text())
    (sound / "config.json").write_text(json.dumps(config | {"transformers_version": "4.40.1"}))
    checkpoint = read_checkpoint(sound)
    assert all(group.hyperparameters.decoupled for group in checkpoint.optimizer.groups)
    said = " ".join(checkpoint.assumptions)
    assert "AdamW from Adam" in said and "counts 2 to 3 steps, the trainer 3" in said and "4.40.1" in said
