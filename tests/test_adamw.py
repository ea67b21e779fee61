"""The step, its parts and its derivative, against torch.optim.AdamW itself: stepping, and going through autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_core.numerics.adamw import (
    AdamHyperparameters,
    AdamState,
    NextStep,
    clip_factor,
    pull_back,
)
from entropy_core.numerics.vectors import dot, global_norm

NOMINAL = 0.05  # learning rate of the first group
GROUPS: dict[str, dict[str, Any]] = {
    "plain": {"lr": NOMINAL, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "other": {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.0},
    "decayed": {"lr": 0.3, "betas": (0.0, 0.5), "eps": 1e-6, "weight_decay": 0.7},
}
VARIANTS = pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
DIRECTIONS = pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])


def hyperparameters_of(group: dict[str, Any]) -> AdamHyperparameters:
    return AdamHyperparameters(
        *group["betas"], group["eps"], group["weight_decay"], group["lr"] / NOMINAL, group.get("maximize", False)
    )


def state_of(slot: dict[str, Tensor]) -> AdamState:
    saved = {key: slot[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    largest = slot["max_exp_avg_sq"].clone() if "max_exp_avg_sq" in slot else None
    return AdamState(int(slot["step"]), saved["exp_avg"], saved["exp_avg_sq"], largest)


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in zip(GROUPS, [(2, 3), (4,), (1, 2, 2)], strict=True)
    }


def optimizer_for(named: dict[str, Tensor], amsgrad: bool, maximize: bool) -> torch.optim.AdamW:
    groups = [{"params": [p], "maximize": maximize} | GROUPS[name] for name, p in named.items()]
    return torch.optim.AdamW(groups, amsgrad=amsgrad, foreach=False)


def gradients_at(named: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Shrinking over the steps, so that amsgrad's maximum is not simply the last value."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * 3.0 / (1 + step)
        for name, p in named.items()
    }


def a_state(amsgrad: bool, maximize: bool, steps: int = 3) -> tuple[dict[str, Tensor], dict[str, AdamState]]:
    """Parameters and the optimizer's state after some steps."""
    named = parameters()
    optimizer = optimizer_for(named, amsgrad, maximize)
    for step in range(steps):
        for name, g in gradients_at(named, step).items():
            named[name].grad = g
        optimizer.step()
    states = {name: state_of(optimizer.state[p]) for name, p in named.items()}
    return {name: p.detach().clone() for name, p in named.items()}, states


@VARIANTS
@DIRECTIONS
def test_the_direction_is_the_step_that_torch_takes(amsgrad: bool, maximize: bool):
    named = parameters()
    optimizer = optimizer_for(named, amsgrad, maximize)
    for step in range(6):
        gradients = gradients_at(named, step)
        before = {name: p.detach().clone() for name, p in named.items()}
        states = {
            name: state_of(optimizer.state[p])
            if optimizer.state[p]
            else AdamState(
                0, torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p).detach() if amsgrad else None
            )
            for name, p in named.items()
        }
        for name, p in named.items():
            p.grad = gradients[name].clone()
        optimizer.step()
        for name, p in named.items():
            group = GROUPS[name] | {"maximize": maximize}
            parts = NextStep(gradients[name], before[name], states[name], hyperparameters_of(group))
            # θ itself is of order 1, so its rounding is what is left of a difference
            torch.testing.assert_close(
                NOMINAL * parts.direction, p.detach() - before[name], rtol=1e-12, atol=1e-15, msg=f"{name}, step {step}"
            )
            assert torch.equal(parts.direction, parts.momentum + parts.gradient + parts.decay)


def test_the_parts_are_what_each_cause_would_do_alone():
    named, states = a_state(amsgrad=False, maximize=False)
    for name, g in gradients_at(named, 3).items():
        h = hyperparameters_of(GROUPS[name])
        parts = NextStep(g, named[name], states[name], h)
        still = torch.zeros_like(named[name])
        nowhere = NextStep(g, still, states[name], h)
        assert torch.equal(nowhere.decay, still) and torch.equal(nowhere.gradient, parts.gradient)
        undecayed = NextStep(g, named[name], states[name], h._replace(weight_decay=0.0))
        torch.testing.assert_close(undecayed.direction, parts.momentum + parts.gradient, rtol=1e-15, atol=0)
        fresh = states[name]._replace(exp_avg=still)
        assert torch.equal(NextStep(g, named[name], fresh, h).momentum, still)
        torch.testing.assert_close(parts.preconditioner * g, parts.gradient, rtol=1e-14, atol=0)
        # against the gradient, towards zero, along the old mean
        assert (parts.gradient * g <= 0).all()
        assert (parts.decay * named[name] <= 0).all()
        assert (parts.momentum * states[name].exp_avg <= 0).all()


@VARIANTS
@DIRECTIONS
def test_decay_through_the_gradient_is_that_of_torchs_adam(amsgrad: bool, maximize: bool):
    named = parameters()
    groups = [{"params": [p], "maximize": maximize} | GROUPS[name] for name, p in named.items()]
    optimizer = torch.optim.Adam(groups, amsgrad=amsgrad, foreach=False)
    for step in range(4):
        for name, g in gradients_at(named, step).items():
            named[name].grad = g
        before = {name: p.detach().clone() for name, p in named.items()}
        states = {name: state_of(optimizer.state[p]) for name, p in named.items() if optimizer.state[p]}
        optimizer.step()
        for name, state in states.items():
            h = hyperparameters_of(GROUPS[name] | {"maximize": maximize})._replace(decoupled=False)
            g, moved = gradients_at(named, step)[name], named[name].detach() - before[name]
            parts = NextStep(g, before[name], state, h)
            torch.testing.assert_close(NOMINAL * parts.direction, moved, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(parts.preconditioner * g, parts.gradient, rtol=1e-14, atol=0)
            bare = NextStep(g, torch.zeros_like(g), state, h)
            assert (bare.decay == 0).all()
            if not h.weight_decay:
                decoupled = NextStep(g, before[name], state, h._replace(decoupled=True))
                assert torch.equal(parts.direction, decoupled.direction)


def torch_step(
    gradient: dict[str, Tensor], named: dict[str, Tensor], states: dict[str, AdamState], maximize: bool, max_norm: float
) -> dict[str, Tensor]:
    """δθ per unit of the nominal learning rate by torch's own AdamW, differentiable in the gradient."""
    if max_norm:
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
        gradient = {name: g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for name, g in gradient.items()}
    steps = {}
    for name, g in gradient.items():
        p = named[name].clone()
        group = {"params": [p], "maximize": maximize} | GROUPS[name]
        amsgrad = states[name].max_exp_avg_sq is not None
        optimizer = torch.optim.AdamW([group], amsgrad=amsgrad, foreach=False, differentiable=True)
        saved = states[name]._asdict() | {"step": torch.tensor(float(states[name].step), dtype=torch.float64)}
        optimizer.state[p] = {key: t.clone() for key, t in saved.items() if t is not None}
        p.grad = g
        optimizer.step()
        steps[name] = (p - named[name]) / NOMINAL
    return steps


@VARIANTS
@DIRECTIONS
def test_the_jacobian_is_that_of_autograd_through_torchs_step(amsgrad: bool, maximize: bool):
    named, states = a_state(amsgrad, maximize)
    gradient = {name: g.requires_grad_() for name, g in gradients_at(named, 3).items()}
    steps = torch_step(gradient, named, states, maximize, max_norm=0.0)
    for name, step in steps.items():
        (expected,) = torch.autograd.grad(step.sum(), gradient[name])  # each element depends on its own gradient only
        h = hyperparameters_of(GROUPS[name] | {"maximize": maximize})
        parts = NextStep(gradient[name].detach(), named[name], states[name], h)
        torch.testing.assert_close(parts.direction, step.detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(parts.jacobian, expected, rtol=1e-11, atol=1e-13)
    if amsgrad:  # both branches of the maximum were met
        larger = [
            beta2 * states[n].exp_avg_sq + (1 - beta2) * gradient[n] ** 2 > states[n].max_exp_avg_sq
            for n, (_, beta2) in ((n, GROUPS[n]["betas"]) for n in named)
        ]
        met = torch.cat([x.flatten() for x in larger])
        assert met.any() and not met.all()


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6], ids=["off", "active", "inactive"])
@VARIANTS
def test_pull_back_is_autograd_through_clipping_and_step(max_norm: float, amsgrad: bool):
    named, states = a_state(amsgrad, maximize=False)
    gradient = {name: g.requires_grad_() for name, g in gradients_at(named, 3).items()}
    generator = torch.Generator().manual_seed(7)
    covector = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in named.items()}
    steps = torch_step(gradient, named, states, maximize=False, max_norm=max_norm)
    scalar = sum((covector[n] * step).sum() for n, step in steps.items())
    expected = dict(zip(gradient, torch.autograd.grad(scalar, list(gradient.values())), strict=True))

    plain = {name: g.detach() for name, g in gradient.items()}
    factor = clip_factor(global_norm(plain), max_norm)
    assert (factor < 1) == (max_norm == 0.5)
    parts = {n: NextStep(factor * plain[n], named[n], states[n], hyperparameters_of(GROUPS[n])) for n in named}
    pulled = pull_back(covector, {n: part.jacobian for n, part in parts.items()}, plain, max_norm)
    for name in named:
        torch.testing.assert_close(pulled[name], expected[name], rtol=1e-11, atol=1e-12)


def test_clipping_is_that_of_torch():
    for scale in (1e-3, 1.0, 50.0):
        for max_norm in (0.1, 1.0, 7.0):
            leaf = torch.zeros(5, dtype=torch.float64, requires_grad=True)
            leaf.grad = torch.randn(5, dtype=torch.float64) * scale
            original = leaf.grad.clone()
            norm = float(torch.nn.utils.clip_grad_norm_([leaf], max_norm))
            assert global_norm({"leaf": original}) == pytest.approx(norm, rel=1e-14)
            torch.testing.assert_close(clip_factor(norm, max_norm) * original, leaf.grad, rtol=1e-14, atol=0)
    assert clip_factor(1e9, 0.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0


@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_untouched_parameter_stays_and_its_derivative_is_finite(amsgrad: bool):
    zero = torch.zeros(3, dtype=torch.float64)
    state = AdamState(4, zero, zero, zero if amsgrad else None)
    parts = NextStep(zero, zero, state, AdamHyperparameters(0.9, 0.999, 1e-8, 0.1))
    assert all(torch.equal(part.abs(), zero) for part in (parts.momentum, parts.decay, parts.gradient))
    # from there, a small gradient moves it by (1 − β₁)/(1 − β₁⁵)/ε times itself
    expected = -(1 - 0.9) / (1 - 0.9**5) / 1e-8
    torch.testing.assert_close(parts.jacobian, torch.full_like(zero, expected), rtol=1e-12, atol=0)


def test_inner_products_are_summed_over_all_parameters_in_float64():
    a = {"x": torch.full((10,), 0.1, dtype=torch.float32), "y": torch.tensor([[2.0]])}
    b = {"y": torch.tensor([[-3.0]]), "x": torch.full((10,), 0.1, dtype=torch.float32)}
    tenth = float(torch.tensor(0.1, dtype=torch.float32))
    assert dot(a, b) == pytest.approx(math.fsum([tenth**2] * 10) - 6.0, rel=1e-15)
    assert global_norm(a) == pytest.approx(math.sqrt(math.fsum([tenth**2] * 10) + 4.0), rel=1e-15)
