"""A whole sweep of a checkpoint of every optimizer: its step is the optimizer's own, and all parts add up to it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import edit_optimizer, make_model
from checkpoint_fixtures import train as train_llama
from checkpoint_fixtures import write as write_llama
from pipeline_fixtures import Probe, probe, save_checkpoint, skip_figures, train, trainer_groups, values, write_reward
from test_optimizers import Lion
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import CheckpointError, ConfigError

RATE = 2e-3


class Several(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for the rest, with the groups and slots of both in one state dict."""

    def __init__(self, model: Any) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [(name, p) for name, p in named if p.ndim == 2]
        rest = [(name, p) for name, p in named if p.ndim != 2]
        self.parts = [torch.optim.Muon(matrices, lr=10 * RATE), torch.optim.AdamW(rest, lr=RATE, weight_decay=0.1)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        saved, first = {"state": {}, "param_groups": []}, 0
        for part in self.parts:
            of_one = part.state_dict()
            saved["state"] |= {first + index: slot for index, slot in of_one["state"].items()}
            (group,) = of_one["param_groups"]
            saved["param_groups"].append(group | {"params": [first + index for index in group["params"]]})
            first += len(group["params"])
        return saved


def adafactor(model: Any, **settings: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(trainer_groups(model), **settings)


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(trainer_groups(model), lr=RATE, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda model: torch.optim.SGD(trainer_groups(model), lr=RATE),
    "Lion": lambda model: Lion(trainer_groups(model), lr=RATE, betas=(0.9, 0.99)),
    "Muon and AdamW": Several,
    "Adafactor": lambda model: adafactor(model, lr=RATE, scale_parameter=False, relative_step=False),
    "Adafactor, own rate": lambda model: adafactor(model, lr=None, beta1=0.9),
    "torch's Adafactor": lambda model: torch.optim.Adafactor(trainer_groups(model), lr=RATE),
}


def make(directory: Path, kind: str) -> tuple[Any, Any]:
    """A GPT-2 after three steps of an optimizer, saved; the two as they are then."""
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(build_tokenizer())}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=1, bos_token_id=None, pad_token_id=0))
    *_, (step, optimizer) = train(model, 3, optimizer=OPTIMIZERS[kind](model))
    save_checkpoint(directory, model, optimizer, step)
    return model, optimizer


def own_step(model: Any, optimizer: Any, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer itself does next, in float64."""
    before = {}
    for name, p in model.named_parameters():
        p.data = p.data.double()
        p.grad, before[name] = gradient[name].reshape(p.shape).clone(), p.data.clone()
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups if isinstance(part, torch.optim.Adafactor) else []:
            group["eps"] = torch.finfo(torch.float32).eps, group["eps"][1]  # it would take that of float64 now
        for slot in part.state.values():
            for key, value in slot.items():
                if isinstance(value, Tensor) and value.ndim:
                    slot[key] = value.double()
    optimizer.step()
    return {name: p.data - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_sweep(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_figures(monkeypatch)
    model, optimizer = make(tmp_path / "run" / "checkpoint-3", kind)
    found: Probe = probe(
        values(
            tmp_path / "run",
            tmp_path / "artifacts",
            batch_config={"E_total_sequences": 16, "B_U": 8, "G": 4},
            update={"reward": write_reward(tmp_path), "max_grad_norm": 0.01},
        )
    )
    (loaded,), (update,) = (found.run.artifacts(name) for name in ("load-checkpoint", "compute-update"))
    assert update.summary["clip_factor"] < 1
    gradient, direction = (update.vector(name) for name in ("gradient", "direction"))
    clipped = {name: update.summary["clip_factor"] * gradient[name].double() for name in gradient}
    rate = loaded.summary["learning_rate"]
    for name, change in own_step(model, optimizer, clipped).items():
        predicted = rate * direction[name].double().view(change.shape)
        torch.testing.assert_close(predicted, change, rtol=1e-9, atol=1e-14, msg=name)
    of_u = found.run.artifacts("first-order-u")[0].summary
    for normalization in ("per_token", "per_sequence"):
        assert abs(of_u["closure"][normalization]) < 1e-9
        assert bool(of_u["rounding"][normalization]) == ("Muon" in kind)
    row = next(row for row in found.rows if row["eta_over_lr"] == 1)
    assert math.isfinite(row["delta_h1"])
    assert ("nothing but signs" in str(row["interval_over_u"])) == (kind == "Lion")
    said = " ".join(loaded.summary["assumptions"])
    assert all(name in said for name in kind.split(",")[0].replace("torch's ", "").split(" without")[0].split(" and "))


def codes(numbers: Tensor) -> dict[str, Tensor]:
    """As bitsandbytes stores a moment in 8 bits: the nearest of 256 values, and the largest number of each block."""
    qmap = torch.linspace(-1, 1, 256)
    blocks = torch.nn.functional.pad(numbers.reshape(-1), (0, -numbers.numel() % 256)).view(-1, 256)
    absmax = blocks.abs().amax(1)
    nearest = ((blocks / absmax.clamp(min=1e-30)[:, None])[..., None] - qmap).abs().argmin(-1).to(torch.uint8)
    return {"state1": nearest.view(-1)[: numbers.numel()].view(numbers.shape), "qmap1": qmap, "absmax1": absmax}


@pytest.mark.parametrize(
    ("kind", "betas", "key"), [("Lion", (0.9, 0.99), "exp_avg"), ("SGD", (0.8, 0.0), "momentum_buffer")]
)
def test_the_optimizers_of_bitsandbytes_with_one_state(kind: str, betas: tuple[float, float], key: str, tmp_path: Path):
    """One moment in codes, or in float32 where it is small; the groups say which optimizer it is."""
    model = make_model()
    optimizer = Lion(trainer_groups(model), lr=RATE, betas=betas)
    train_llama(model, optimizer)
    directory = write_llama(tmp_path / "c", model, optimizer)

    def as_bitsandbytes(saved: dict[str, Any]) -> None:
        for slot in saved["state"].values():
            moment = slot.pop("exp_avg")
            slot |= {"step": 3} | (codes(moment) if moment.numel() > 100 else {"state1": moment})
        for group in saved["param_groups"]:
            group |= {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}

    edit_optimizer(directory, as_bitsandbytes)
    found = read_checkpoint(directory)
    assert {group.rule for group in found.optimizer.groups} == {kind.lower()}
    for name, p in model.named_parameters():
        moment = found.optimizer.moments[key][name]
        moment = moment if isinstance(moment, Tensor) else moment.whole()
        truth = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(moment, truth, rtol=0, atol=float(truth.abs().max()) / 200 if p.numel() > 100 else 0)
    of = [group.hyperparameters for group in found.optimizer.groups]
    assert [h.weight_decay for h in of] == [0.1, 0.0]
    assert all((h.beta1 if kind == "Lion" else h.momentum) == betas[0] for h in of)


def test_an_adafactor_that_makes_its_own_learning_rate_takes_no_other(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-3", "Adafactor, own rate")
    assert read_checkpoint(tmp_path / "checkpoint-3").optimizer.learning_rate == 1e-2
    with pytest.raises(ConfigError, match="makes its own"):
        read_checkpoint(tmp_path / "checkpoint-3", 1e-3)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.keys() - {"Adafactor, own rate"}))
def test_a_rounding_that_is_not_known_is_refused(kind: str, tmp_path: Path) -> None:
    model = make_model().bfloat16()
    optimizer = OPTIMIZERS[kind](model)
    train_llama(model, optimizer)
    directory = write_llama(tmp_path / "c", model, optimizer)
    assert json.loads((directory / "trainer_state.json").read_text())["global_step"] == 3
    name = kind.removeprefix("torch's ").split()[0]
    with pytest.raises(CheckpointError, match=f"kept in (BF16|bfloat16), and how {name} rounds its step there is not"):
        read_checkpoint(directory)
