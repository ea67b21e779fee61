"""The moments of torchao's 8-bit and 4-bit AdamW, from files that it wrote, without torchao."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.layouts.torchao_moments import plain_state
from entropy_core.checkpoints.optimizer_file import SavedMoments, load_optimizer
from entropy_core.checkpoints.pieces import Quantised, Scattered
from entropy_core.errors import CheckpointError
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep

OTHERS = Path(__file__).parent / "of_other_writers"
BITS = pytest.mark.parametrize("bits", [8, 4])


def saved(bits: int, tmp_path: Path) -> Path:
    return Path(shutil.copy(OTHERS / f"torchao_adamw{bits}bit.pt", tmp_path / "optimizer.pt"))


@BITS
def test_the_next_step_is_the_one_that_torchao_takes(bits: int, tmp_path: Path) -> None:
    path = saved(bits, tmp_path)
    found, moments = load_optimizer(path), SavedMoments(path)
    (group,) = found.groups
    assert (group["lr"], group["weight_decay"], group["rule"]) == (pytest.approx(1e-3), 0.1, "adamw")
    hyperparameters = AdamHyperparameters(*group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
    assert isinstance(found.slots[0]["exp_avg"], Quantised) and isinstance(found.slots[1]["exp_avg"], Scattered)
    generator = torch.Generator().manual_seed(99)
    truth = read_archive(path)["next_step"]
    for slot, (before, after) in enumerate(zip(truth["before"], truth["after"], strict=True)):
        theta, moved = (stored.flat(0, stored.numel()).double() for stored in (before, after))
        g = torch.randn(before.shape, generator=generator).double().view(-1)
        pieces = []
        for start in range(0, theta.numel(), 77):  # blocks begin within a byte, and within a scale
            stop = min(start + 77, theta.numel())
            read: list[Any] = [moments.read(slot, key, start, stop) for key in ("exp_avg", "exp_avg_sq")]
            state = AdamState(int(found.slots[slot]["step"]), *read)
            pieces.append(NextStep(g[start:stop], theta[start:stop], state, hyperparameters).direction)
        change, step = moved - theta, 1e-3 * torch.cat(pieces)
        assert float((change - step).abs().max()) < 1e-6  # the rounding of float32 weights of order 1
        assert float((change - step).norm() / change.norm()) < 1e-4


@BITS
def test_a_moment_is_its_codes_times_their_scales(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**bits, (6, 8), generator=generator)
    flat = numbers.view(-1)
    codes = (flat if bits == 8 else flat[::2] * 16 + flat[1::2]).to(torch.uint8)
    qmap, absmax = torch.randn(2**bits, generator=generator), torch.rand(3, generator=generator)
    moment = Quantised(codes, qmap, absmax, (6, 8), bits, 16)
    expected: Tensor = (qmap[flat].view(3, 16) * absmax[:, None]).view(6, 8)
    assert torch.equal(moment.whole(), expected)
    for start in range(47):
        assert torch.equal(moment.flat(start, start + 2), expected.view(-1)[start : start + 2])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda moment: setattr(moment, "name", "torchao.optim.subclass_fp8.OptimStateFp8"), "torchao's OptimStateFp8"),
        (lambda moment: setattr(moment, "name", "torchao.optim.subclass_8bit.OptimState8bit"), "2048 codes with 16"),
        (lambda moment: setattr(moment.arguments[0], "name", "torch.bfloat16"), "not float32, which it rounds"),
        (lambda moment: moment.arguments.append(0), "not float32"),
        (lambda moment: moment.arguments.clear(), "not float32"),
        (lambda moment: moment.state.pop("scale"), "without its codes or scales"),
        (lambda moment: moment.state.update(block_size=0), "2048 codes with 16 values"),
        (lambda moment: moment.state.update(codes=moment.state["scale"]), "32 codes with"),
    ],
)
def test_what_cannot_be_is_refused(spoil: Any, said: str) -> None:
    path = OTHERS / "torchao_adamw4bit.pt"
    content = read_archive(path)
    spoil(content["state"][0]["exp_avg"])
    with pytest.raises(CheckpointError, match=said):
        plain_state(path, content)


def test_a_slot_that_is_none_is_left_to_the_reader_of_slots() -> None:
    path = OTHERS / "torchao_adamw4bit.pt"
    content = read_archive(path)
    content["state"][0] = 5
    assert plain_state(path, content)["state"][0] == 5
