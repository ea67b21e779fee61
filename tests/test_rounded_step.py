"""The step of weights kept in bfloat16, bit for bit that of torch's own optimizer on such weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.rounded_step import rounded_clip_factor, rounded_step

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.99), 1e-8, 0.1
SHAPES = ((40, 30), (300,), (1,))
KINDS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "fused amsgrad": {"amsgrad": True, "fused": True},
    "maximize": {"maximize": True, "fused": True},
}


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_goes_where_torch_puts_it(
    kind: str, dtype: torch.dtype, optimizer_class: type[torch.optim.Adam], max_norm: float
):
    torch.manual_seed(0)
    eps = 1e-4 if dtype == torch.float16 else EPS  # 1e-8 is 0 in float16
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = optimizer_class(parameters, lr=LR, betas=BETAS, eps=eps, weight_decay=DECAY, **KINDS[kind])

    def step(wide: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, wide, strict=True):
            parameter.grad = gradient.to(dtype)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    for seed in range(3):
        step(gradients(seed))
    group, wide = optimizer.param_groups[0], gradients(3)
    hyperparameters = AdamHyperparameters(
        *BETAS,
        eps,
        DECAY,
        maximize=group["maximize"],
        decoupled=group["decoupled_weight_decay"],
        amsgrad=group["amsgrad"],
    )
    clip = rounded_clip_factor([(gradient, dtype) for gradient in wide], max_norm)
    assert (clip < 0.5) == bool(max_norm)
    found, expected, unrounded = [], [], []
    for parameter, gradient in zip(parameters, wide, strict=True):
        slot = optimizer.state[parameter]
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        moments = [slot[key].double() for key in keys]
        state, theta = AdamState(int(slot["step"]), *moments), parameter.detach().double()
        narrow = gradient.to(dtype) * torch.tensor(clip)
        change = rounded_step(narrow, theta, state, hyperparameters, LR, dtype, bool(group["fused"])).change
        found.append(theta + change)
        unrounded.append(theta + LR * NextStep(clip * gradient.double(), theta, state, hyperparameters).direction)
    before = [parameter.detach().clone() for parameter in parameters]
    step(wide)
    for new, parameter, old, exact in zip(found, parameters, before, unrounded, strict=True):
        assert torch.equal(new, parameter.detach().double())
        expected.append(parameter.detach() != old)
        assert parameter.numel() == 1 or not torch.equal(new, exact)
    moved = float(torch.cat([mask.flatten() for mask in expected]).double().mean())
    assert 0.1 < moved < 1 or dtype == torch.float16  # rounding keeps some weights where they are


def test_a_block_is_stepped_as_its_parameter_is():
    torch.manual_seed(1)
    theta, gradient, first = (torch.randn(100).bfloat16().double() for _ in range(3))
    state = AdamState(4, first, first.square().bfloat16().double())
    arguments = (AdamHyperparameters(0.9, 0.99, 1e-8, 0.1), 1e-2, torch.bfloat16, False)
    whole = rounded_step(gradient, theta, state, *arguments).change
    part = AdamState(4, state.exp_avg[30:70], state.exp_avg_sq[30:70])
    assert torch.equal(rounded_step(gradient[30:70], theta[30:70], part, *arguments).change, whole[30:70])


def test_the_clip_factor_is_the_rounded_one():
    wide = gradients(5)
    exact = 1 / (sum(float(g.double().square().sum()) for g in wide) ** 0.5 + 1e-6)
    rounded = rounded_clip_factor([(g, torch.bfloat16) for g in wide], 1.0)
    assert rounded != pytest.approx(exact, rel=1e-5) and rounded == pytest.approx(exact, rel=1e-2)
    mixed = [(wide[0], torch.bfloat16), (wide[1], torch.float32), (wide[2], torch.bfloat16)]
    parameters = [torch.nn.Parameter(g.to(dtype)) for g, dtype in mixed]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    scaled = float(parameters[1].grad[7] / parameters[1].detach()[7])
    assert scaled == pytest.approx(rounded_clip_factor(mixed, 1.0), rel=1e-6)
