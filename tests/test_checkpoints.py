"""Checkpoints are real files: a small random Llama saved by transformers, torch's AdamW after steps on real gradients.

The truth about names is `optimizer.state[parameter]`: keyed by the parameter itself, it knows nothing of order.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core import checkpoint_files, checkpoints
from entropy_core.architecture import NO_DECAY_PATTERNS
from entropy_core.checkpoint_files import checkpoint_digest, file_digest, file_digests, find_checkpoints, weights_digest
from entropy_core.checkpoints import read_checkpoint
from entropy_core.errors import CheckpointError, ConfigError

HYPERPARAMETERS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7}
STEPS = 3


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


def trainer_groups(model: torch.nn.Module, named: bool = False, decay: float = 0.1) -> list[dict]:
    """The Trainer's grouping of a Llama, written out: everything but the RMS norms decays."""
    norms = [(n, p) for n, p in model.named_parameters() if "norm" in n]
    others = [(n, p) for n, p in model.named_parameters() if "norm" not in n]
    pick: Callable[[list], list] = (lambda pairs: pairs) if named else (lambda pairs: [p for _, p in pairs])
    return [{"params": pick(others), "weight_decay": decay}, {"params": pick(norms), "weight_decay": 0.0}]


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
            torch.testing.assert_close(getattr(optimizer, key)[name], slot[key], rtol=0, atol=0)
    # The comparison can fail: no two parameters of one shape have the same moments.
    moments = list(optimizer.exp_avg.values())
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(moments) for b in moments[:i])
    return checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the Trainer groups it, without names."""
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    return write(tmp_path_factory.mktemp("run") / "checkpoint-3", model, optimizer)


@pytest.fixture
def sound(original: Path, tmp_path: Path) -> Path:
    """The original's copy, to break."""
    return Path(shutil.copytree(original, tmp_path / original.name))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_names_follow_the_trainers_groups(tmp_path: Path, tied: bool) -> None:
    model = make_model(tied)
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    train(model, optimizer)
    checkpoint = assert_same_state(write(tmp_path / "checkpoint-3", model, optimizer), by_name(model, optimizer))

    assert ("lm_head.weight" in checkpoint.parameter_shapes) is not tied
    decay, no_decay = checkpoint.optimizer.groups
    assert (decay.weight_decay, no_decay.weight_decay) == (0.1, 0.0)
    assert all("norm" in name for name in no_decay.names) and len(no_decay.names) == 5
    for group in (decay, no_decay):
        assert (group.lr, group.beta1, group.beta2, group.eps) == (3e-3, 0.8, 0.95, 1e-7)
        assert (group.decoupled, group.amsgrad, group.maximize) == (True, False, False)
    assert checkpoint.optimizer.learning_rate == 3e-3
    assert (checkpoint.name, checkpoint.step) == ("checkpoint-3", 3)
    assert len(checkpoint.assumptions) == 1 and "Trainer's" in checkpoint.assumptions[0]


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
    assert [group.lr for group in checkpoint.optimizer.groups] == [1e-4, 3e-3, 3e-3]
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
    assert [group.weight_decay for group in checkpoint.optimizer.groups] == [0.05, 0.0]


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


def edit_optimizer(directory: Path, change: Callable[[dict], object]) -> None:
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, directory / "optimizer.pt")


def set_group(key: str, *values: object) -> Callable[[dict], None]:
    def change(saved: dict) -> None:
        for group, value in zip(saved["param_groups"], values, strict=True):
            group[key] = value

    return change


def test_a_given_learning_rate_keeps_the_ratios(sound: Path) -> None:
    edit_optimizer(sound, set_group("lr", 1e-3, torch.tensor(2.5e-4, dtype=torch.float64)))
    assert [group.lr for group in read_checkpoint(sound).optimizer.groups] == [1e-3, 2.5e-4]
    checkpoint = read_checkpoint(sound, learning_rate=4e-6)
    assert [group.lr for group in checkpoint.optimizer.groups] == pytest.approx([4e-6, 1e-6], rel=1e-12)
    assert checkpoint.optimizer.learning_rate == 4e-6
    assert any("4e-06 in place of the saved 0.001" in line for line in checkpoint.assumptions)


def test_a_learning_rate_after_the_end_of_the_schedule(sound: Path) -> None:
    edit_optimizer(sound, set_group("lr", 0.0, 0.0))
    assert [group.lr for group in read_checkpoint(sound, 2e-6).optimizer.groups] == [2e-6, 2e-6]
    edit_optimizer(sound, set_group("initial_lr", 1e-3, 5e-4))
    assert [group.lr for group in read_checkpoint(sound, 2e-6).optimizer.groups] == pytest.approx(
        [2e-6, 1e-6], rel=1e-12
    )


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
        torch.testing.assert_close(checkpoint.optimizer.max_exp_avg_sq[name], slot["max_exp_avg_sq"], rtol=0, atol=0)
    assert all(g.amsgrad and g.maximize and not g.decoupled for g in checkpoint.optimizer.groups)


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}, {"fused": True, "amsgrad": True}], ids=str)
def test_the_variants_of_torchs_adamw_hold_the_same_state(tmp_path: Path, kernel: dict[str, bool]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS, **kernel)
    train(model, optimizer)
    directory = write(tmp_path / "c", model, optimizer)
    checkpoint = assert_same_state(directory, by_name(model, optimizer))
    assert bool(checkpoint.optimizer.max_exp_avg_sq) == ("amsgrad" in kernel)
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
    assert {m.dtype for m in checkpoint.optimizer.exp_avg.values()} == {moments}
    assert "Weights are saved as BF16 and widened" in checkpoint.assumptions[0]


def test_what_the_files_do_not_say_is_an_assumption(sound: Path) -> None:
    edit_optimizer(sound, lambda saved: [group.pop("decoupled_weight_decay") for group in saved["param_groups"]])
    edit_optimizer(sound, lambda saved: saved["state"][0]["step"].fill_(2))
    config = json.loads((sound / "config.json").read_text())
    (sound / "config.json").write_text(json.dumps(config | {"transformers_version": "4.40.1"}))
    checkpoint = read_checkpoint(sound)
    assert all(group.decoupled for group in checkpoint.optimizer.groups)
    said = " ".join(checkpoint.assumptions)
    assert "AdamW from Adam" in said and "counts 2 to 3 steps, the trainer 3" in said and "4.40.1" in said


# --- refusals --------------------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size // 2)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def optimizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda directory: edit_optimizer(directory, change)


def each_slot(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return optimizer(lambda saved: [change(slot) for slot in saved["state"].values()])


def other_optimizer(build: Callable[[Iterable], torch.optim.Optimizer], steps: int = STEPS) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        model = make_model()
        other = build(trainer_groups(model))
        train(model, other, steps)
        torch.save(other.state_dict(), directory / "optimizer.pt")

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file({k: v.clone() for k, v in state.items()}, directory / "model.safetensors", {"format": "pt"})

    return edit


def swap_groups(saved: dict) -> None:
    saved["param_groups"].reverse()


def swap_two_indices(saved: dict) -> None:
    indices = saved["param_groups"][0]["params"]
    indices[0], indices[1] = indices[1], indices[0]


def three_groups(saved: dict) -> None:
    last = saved["param_groups"][1]
    saved["param_groups"].append(last | {"params": [last["params"].pop()]})


def drop_parameter(saved: dict) -> None:
    """As if q_proj of layer 0 had been frozen before the optimizer was made."""
    saved["state"].pop(saved["param_groups"][0]["params"].pop(1))


def foreign_name(saved: dict) -> None:
    for group in saved["param_groups"]:
        group["param_names"] = [f"transformer.h.{i}.weight" for i in group["params"]]


EMBEDDING = "model.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "There is no directory"),
    "no config": (remove("config.json"), "has no config.json"),
    "config is not JSON": (text("config.json", "{"), r"config\.json is not readable JSON"),
    "config is a list": (text("config.json", "[]"), "holds a JSON list"),
    "config of an unknown model": (text("config.json", '{"model_type": "nonesuch"}'), "does not describe a causal"),
    "config of custom code": (
        text("config.json", '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}'),
        "custom code is not run",
    ),
    "adapter": (text("adapter_config.json", "{}"), "holds both an adapter"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "truncated weights": (truncate("model.safetensors"), r"model\.safetensors cannot be opened"),
    "weights that are no safetensors": (text("model.safetensors", "version https://git-lfs"), "cannot be opened"),
    "a weight is missing": (tensors(lambda s: s.pop(EMBEDDING)), f"no weights for {EMBEDDING}"),
    "a weight of another shape": (
        tensors(lambda s: s.update({EMBEDDING: torch.zeros(25, 8)})),
        rf"other shapes than config\.json says: {EMBEDDING} \(25, 8\) \(config: \(24, 8\)\)",
    ),
    "no trainer state": (remove("trainer_state.json"), r"has no trainer_state\.json"),
    "trainer state is not JSON": (truncate("trainer_state.json"), r"trainer_state\.json is not readable JSON"),
    "no global step": (text("trainer_state.json", "{}"), "global_step None"),
    "global step 0": (text("trainer_state.json", '{"global_step": 0}'), "global_step 0"),
    "no optimizer": (remove("optimizer.pt"), r"has no optimizer\.pt.*save_only_model=True"),
    "truncated optimizer": (truncate("optimizer.pt"), "not a complete archive"),
    "empty optimizer": (text("optimizer.pt", ""), "not a complete archive"),
    "optimizer is a list": (lambda d: torch.save([1], d / "optimizer.pt"), "not the state_dict of a torch optimizer"),
    "optimizer without groups": (optimizer(lambda s: s.pop("param_groups")), "not the state_dict"),
    "SGD": (other_optimizer(lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9)), "momentum_buffer.*SGD with momentum"),
    "plain SGD": (other_optimizer(lambda g: torch.optim.SGD(g, lr=0.1)), "the run used SGD"),
    "RMSprop": (other_optimizer(lambda g: torch.optim.RMSprop(g, lr=0.1)), "square_avg.*RMSprop"),
    "NAdam": (other_optimizer(lambda g: torch.optim.NAdam(g, lr=0.1)), "mu_product.*NAdam"),
    "RAdam": (other_optimizer(lambda g: torch.optim.RAdam(g, lr=0.1)), "not torch's Adam or AdamW"),
    "first moment only": (each_slot(lambda slot: slot.pop("exp_avg_sq")), r"its slots are exp_avg, step"),
    "AdamW before a step": (other_optimizer(lambda g: torch.optim.AdamW(g, lr=0.1), steps=0), "has no slots"),
    "no betas, no eps": (
        optimizer(lambda s: [s["param_groups"][1].pop(k) for k in ("betas", "eps")]),
        "no betas, eps in",
    ),
    "no learning rate": (optimizer(lambda s: s["param_groups"][0].pop("lr")), "has no lr in param group 0"),
    "no weight decay": (optimizer(lambda s: s["param_groups"][0].pop("weight_decay")), "has no weight_decay in"),
    "betas out of range": (optimizer(set_group("betas", (0.9, 1.0), (0.9, 1.0))), "out of range"),
    "NaN learning rate": (optimizer(set_group("lr", math.nan, math.nan)), "out of range: lr nan"),
    "learning rate 0": (
        optimizer(set_group("lr", 0.0, 0.0)),
        "learning rate 0 in every.*schedule.*set `learning_rate`",
    ),
    "a slot is missing": (
        optimizer(lambda s: s["state"].pop(1)),
        r"covers 20 of 21 trained parameters; missing: model\.layers\.0\.self_attn\.q_proj\.weight\.",
    ),
    "many slots are missing": (optimizer(lambda s: [s["state"].pop(i) for i in range(1, 13)]), "and 4 more"),
    "a frozen parameter": (
        optimizer(drop_parameter),
        r"15 \+ 5 parameters, the model has 16 \+ 5.*1 missing among .*q_proj",
    ),
    "extra slots": (optimizer(lambda s: s["state"].update({99: s["state"][0]})), "no parameter group: 99"),
    "groups in another order": (optimizer(swap_groups), r"lists 5 \+ 16 parameters"),
    "indices in another order": (
        optimizer(swap_two_indices),
        rf"another shape than their parameter: {EMBEDDING} \(exp_avg \(8, 8\), model \(24, 8\)\)",
    ),
    "three groups": (optimizer(three_groups), "3 param groups and no parameter names"),
    "decay in both groups": (optimizer(set_group("weight_decay", 0.1, 0.1)), "groups are not the Trainer's"),
    "names of another model": (optimizer(foreign_name), r"does not have.*transformer\.h\.0"),
    "wrong shape": (
        optimizer(lambda s: s["state"][0].update(exp_avg_sq=torch.ones(8, 24))),
        rf"{EMBEDDING} \(exp_avg_sq \(8, 24\), model \(24, 8\)\)",
    ),
    "one moment is missing": (optimizer(lambda s: s["state"][0].pop("exp_avg_sq")), rf"lack a moment: {EMBEDDING}"),
    "amsgrad without its slot": (optimizer(set_group("amsgrad", True, False)), "max_exp_avg_sq"),
    "NaN": (optimizer(lambda s: s["state"][0]["exp_avg"][3].fill_(math.nan)), rf"NaN.*{EMBEDDING} \(exp_avg\)"),
    "infinity": (optimizer(lambda s: s["state"][0]["exp_avg_sq"][3].fill_(math.inf)), rf"{EMBEDDING} \(exp_avg_sq\)"),
    "a negative square": (
        optimizer(lambda s: s["state"][0]["exp_avg_sq"][3].fill_(-1.0)),
        rf"{EMBEDDING} \(exp_avg_sq\)",
    ),
    "no step count": (optimizer(lambda s: s["state"][0].pop("step")), f"no step count, or one of 0, for {EMBEDDING}"),
    "step 0": (each_slot(lambda slot: slot["step"].zero_()), "no step count, or one of 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(sound: Path, case: str) -> None:
    read_checkpoint(sound)
    break_it, message = BROKEN[case]
    break_it(sound)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_checkpoint(sound)
    said = str(refusal.value)
    assert "\n" not in said and str(sound) in said and refusal.value.way_out


def test_code_in_a_pickle_is_not_executed(sound: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    payload = {"state": {}, "param_groups": [{"params": []}], "more": RunsCode(witness)}
    torch.save(payload, sound / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"more than tensors and numbers \((posix|nt)\.mkdir\), and was not executed"
    ):
        read_checkpoint(sound)
    (sound / "optimizer.pt").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="bare pickle"):
        read_checkpoint(sound)
    assert not witness.exists()

    pickle.loads((sound / "optimizer.pt").read_bytes())  # the payload does work
    assert witness.exists()


def test_training_args_is_never_opened(sound: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    torch.save(RunsCode(witness), sound / "training_args.bin")
    read_checkpoint(sound)
    assert "training_args.bin" not in file_digests(sound)
    assert not witness.exists()


def test_layouts_that_other_trainers_write_are_named(sound: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run directory, with checkpoint-3 in it.*checkpoint-\*"):
        read_checkpoint(sound.parent)
    (sound / "optimizer.pt").unlink()
    (sound / "global_step3").mkdir()
    with pytest.raises(CheckpointError, match="DeepSpeed or FSDP as global_step3"):
        read_checkpoint(sound)
    (sound / "model.safetensors").rename(sound / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"convert pytorch_model\.bin to safetensors"):
        read_checkpoint(sound)


def test_weights_that_transformers_renames_are_left_to_it(sound: Path) -> None:
    tensors(lambda s: s.update({"decoder.embed.weight": s.pop(EMBEDDING)}))(sound)
    assert any("1 parameters under other names" in line for line in read_checkpoint(sound).assumptions)


def test_reading_changes_nothing(sound: Path) -> None:
    default = torch.get_default_dtype()
    before = file_digests(sound)
    read_checkpoint(sound).optimizer.exp_avg[EMBEDDING].zero_()  # the map is private
    assert torch.get_default_dtype() == default
    checkpoint_files._digests.clear()
    assert file_digests(sound) == before


# --- finding and digests ---------------------------------------------------------------------------------------------


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


def test_digests_are_of_the_files_that_determine_results(sound: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "merges.txt",
    ):
        (sound / name).write_text(name)
    for name in ("training_args.bin", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "README.md"):
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
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    for name, digest in digests.items():
        assert digest == hashlib.sha256((sound / name).read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="no directory"):
        file_digests(sound / "nowhere")


def test_a_file_is_hashed_once_until_it_changes(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = checkpoint_files.hashlib.file_digest

    def counted(file, name):
        hashed.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(checkpoint_files.hashlib, "file_digest", counted)
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
    ("edit", "same_policy"),
    [
        (optimizer(lambda s: s["state"][0]["exp_avg"].mul_(2)), True),
        (text("trainer_state.json", '{"global_step": 9}'), True),
        (tensors(lambda s: s[EMBEDDING].mul_(2)), False),
        (text("chat_template.jinja", "{{ messages }}"), False),
    ],
    ids=["optimizer", "trainer state", "weights", "chat template"],
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
    modules = "entropy_core.checkpoint_content, entropy_core.checkpoint_files"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_are_frozen(sound: Path) -> None:
    checkpoint = read_checkpoint(sound)
    for record in (checkpoint, checkpoint.optimizer, checkpoint.optimizer.groups[0]):
        with pytest.raises(AttributeError):
            setattr(record, fields(record)[0].name, None)
