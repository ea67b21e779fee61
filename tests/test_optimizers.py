"""The next steps of SGD, Lion, Adafactor and Muon against the optimizers themselves, and their derivatives."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_core.numerics.adafactor import AdafactorHyperparameters, AdafactorState, AdafactorStep, own_learning_rate
from entropy_core.numerics.lion import LionHyperparameters, LionState, LionStep
from entropy_core.numerics.muon import MuonHyperparameters, MuonState, MuonStep
from entropy_core.numerics.next_step import NextStep
from entropy_core.numerics.sgd import SGDHyperparameters, SGDState, SGDStep

NOMINAL = 0.05
SHAPES = {"wide": (3, 7), "tall": (6, 4), "vector": (5,), "cube": (2, 3, 4)}

Make = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], NextStep]


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p -= group["lr"] * ((beta1 * m + (1 - beta1) * p.grad).sign() + group["weight_decay"] * p)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def sgd_step(g: Tensor, theta: Tensor, slot: dict[str, Any], group: dict[str, Any]) -> SGDStep:
    h = SGDHyperparameters(
        *(group[key] for key in ("momentum", "dampening", "nesterov", "weight_decay")),
        relative_lr=group["lr"] / NOMINAL,
        maximize=group["maximize"],
    )
    return SGDStep(g, theta, SGDState(0, slot.get("momentum_buffer")), h)


def lion_step(g: Tensor, theta: Tensor, slot: dict[str, Any], group: dict[str, Any]) -> LionStep:
    h = LionHyperparameters(group["betas"][0], group["weight_decay"], group["lr"] / NOMINAL)
    return LionStep(g, theta, LionState(0, slot["exp_avg"]), h)


def muon_step(g: Tensor, theta: Tensor, slot: dict[str, Any], group: dict[str, Any]) -> MuonStep:
    h = MuonHyperparameters(
        *(group[key] for key in ("momentum", "weight_decay", "nesterov", "ns_coefficients", "ns_steps", "eps")),
        match_rms_adamw=group["adjust_lr_fn"] == "match_rms_adamw",
        relative_lr=group["lr"] / NOMINAL,
    )
    return MuonStep(g, theta, MuonState(0, slot["momentum_buffer"]), h)


def torchs_adafactor_step(g: Tensor, theta: Tensor, slot: dict[str, Any], group: dict[str, Any]) -> AdafactorStep:
    h = AdafactorHyperparameters(
        eps1=torch.finfo(torch.float64).eps if group["eps"][0] is None else group["eps"][0],
        eps2=group["eps"][1],
        clip_threshold=group["d"],
        decay_rate=group["beta2_decay"],
        weight_decay=group["weight_decay"],
        lr=group["lr"],
        of_torch=True,
        relative_lr=group["lr"] / NOMINAL,
        maximize=group["maximize"],
    )
    moments = {key: slot[key] for key in ("row_var", "col_var", "variance") if key in slot}
    return AdafactorStep(g, theta, AdafactorState(int(slot["step"]), **moments), h)


def adafactor_step(g: Tensor, theta: Tensor, slot: dict[str, Any], group: dict[str, Any]) -> AdafactorStep:
    step = int(slot["step"])
    lr = own_learning_rate(step + 1, group["warmup_init"]) if group["relative_step"] else group["lr"]
    h = AdafactorHyperparameters(
        *group["eps"],
        group["clip_threshold"],
        group["decay_rate"],
        group["weight_decay"],
        lr,
        group["beta1"],
        group["scale_parameter"],
        relative_lr=lr / NOMINAL,
    )
    keys = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg")
    return AdafactorStep(g, theta, AdafactorState(step, **{key: slot[key] for key in keys if key in slot}), h)


def adafactor(params: Any, **settings: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, **settings)


Case = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], Make]
CASES: dict[str, Case] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.0}, sgd_step),
    "SGD, decay, maximize": (torch.optim.SGD, {"momentum": 0.0, "weight_decay": 0.3, "maximize": True}, sgd_step),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, sgd_step),
    "SGD, dampening": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.4, "maximize": True}, sgd_step),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.2}, sgd_step),
    "Lion": (Lion, {"betas": (0.9, 0.99), "weight_decay": 0.2}, lion_step),
    "Lion, other betas": (Lion, {"betas": (0.6, 0.7), "weight_decay": 0.0}, lion_step),
    "Muon": (torch.optim.Muon, {}, muon_step),
    "Muon, Moonshot's scale": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8}, muon_step),
    "Muon, plain momentum": (torch.optim.Muon, {"nesterov": False, "ns_steps": 3, "weight_decay": 0.0}, muon_step),
    "torch's Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}, torchs_adafactor_step),
    "torch's Adafactor, clipped": (
        torch.optim.Adafactor,
        {"beta2_decay": -0.2, "maximize": True, "eps": (1e-3, 5.0), "foreach": False},
        torchs_adafactor_step,
    ),
    "torch's Adafactor, lr above 1/√t": (torch.optim.Adafactor, {"lr": 0.9}, torchs_adafactor_step),
    "Adafactor, as the Trainer makes it": (
        adafactor,
        {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1},
        adafactor_step,
    ),
    "Adafactor, scaled, with momentum": (
        adafactor,
        {"relative_step": False, "beta1": 0.8, "weight_decay": 0.2, "clip_threshold": 1.2},
        adafactor_step,
    ),
    "Adafactor, own rate": (adafactor, {"lr": None, "warmup_init": True}, adafactor_step),
}
ALL = pytest.mark.parametrize("case", CASES)


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * len(name) + 100 * step)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64) * 2.0 / (1 + step)


def states(
    case: str, steps: int = 3
) -> dict[str, tuple[Tensor, dict[str, Any], dict[str, Any], torch.optim.Optimizer]]:
    """Parameter, slot and group after some steps, and the optimizer that would take the next."""
    make, settings, _ = CASES[case]
    found = {}
    for name in SHAPES:
        if make is torch.optim.Muon and len(SHAPES[name]) != 2:
            continue
        generator = torch.Generator().manual_seed(len(name))
        theta = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = make([theta], **{"lr": 0.02} | settings)
        for step in range(steps):
            theta.grad = gradient(name, step)
            optimizer.step()
        slot = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in optimizer.state[theta].items()
        }
        found[name] = theta, slot, optimizer.param_groups[0], optimizer
    return found


@ALL
def test_the_step_is_the_one_that_the_optimizer_takes(case: str) -> None:
    for name, (theta, slot, group, optimizer) in states(case).items():
        g, before = gradient(name, 9), theta.detach().clone()
        step = CASES[case][2](g, before, slot, group)
        theta.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(NOMINAL * step.taken, theta.detach() - before, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.direction, step.momentum + step.gradient + step.decay, rtol=1e-12, atol=1e-13)
        if "Muon" in case:  # the rounding of bfloat16, and no more
            assert 1e-4 < float((step.taken - step.direction).norm() / step.direction.norm()) < 0.05
        else:
            assert torch.equal(step.taken, step.direction)


@ALL
def test_the_pull_back_is_the_transpose_of_the_derivative(case: str) -> None:
    """Against central differences of the step along several directions."""
    generator = torch.Generator().manual_seed(0)
    for name, (theta, slot, group, _) in states(case).items():
        g, before = gradient(name, 9), theta.detach().clone()

        def direction(g: Tensor, before=before, slot=slot, group=group) -> Tensor:
            return CASES[case][2](g, before, slot, group).direction

        step = CASES[case][2](g, before, slot, group)
        for _ in range(4):
            dg, a = (torch.randn(g.shape, generator=generator, dtype=torch.float64) for _ in range(2))
            h = 1e-5
            change = (direction(g + h * dg) - direction(g - h * dg)) / (2 * h)
            there, back = float((a * change).sum()), float((step.pulled_back(a) * dg).sum())
            assert math.isclose(there, back, rel_tol=1e-6, abs_tol=1e-8), name


@ALL
def test_with_the_denominators_held_fixed_the_step_is_linear_in_the_gradient(case: str) -> None:
    """Pᵀ is the transpose of g → `gradient`, which for these rules is the same map: P is symmetric."""
    generator = torch.Generator().manual_seed(1)
    for name, (theta, slot, group, _) in states(case).items():
        g = gradient(name, 9)
        step = CASES[case][2](g, theta.detach(), slot, group)
        torch.testing.assert_close(step.preconditioned(g), step.gradient, rtol=1e-12, atol=1e-14)
        a, b = (torch.randn(g.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        assert math.isclose(
            float((a * step.preconditioned(b)).sum()), float((b * step.preconditioned(a)).sum()), rel_tol=1e-10
        )
        assert float(step.decay.abs().sum()) != 0 or not group["weight_decay"]


def test_a_gradient_of_zeros_is_no_division_by_zero() -> None:
    for case, (_, _, make) in CASES.items():
        for theta, slot, group, _ in states(case).values():
            still = torch.zeros_like(theta).detach()
            step = make(still, theta.detach(), slot, group)
            for vector in (step.direction, step.taken, step.pulled_back(torch.ones_like(still))):
                assert vector.isfinite().all(), case
