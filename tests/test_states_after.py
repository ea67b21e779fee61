"""The state of an optimizer after a step, from which the next step of a phase starts, against torch's own."""

from typing import Any

import pytest
import torch
from test_adamw import NOMINAL, hyperparameters_of, state_of

from entropy_core.numerics.adamw import AdamState, NextStep
from entropy_core.numerics.muon import MuonHyperparameters, MuonState, MuonStep
from entropy_core.numerics.rounded_step import rounded_step
from entropy_core.numerics.rules import RULES
from entropy_core.numerics.sgd import SGDHyperparameters, SGDState, SGDStep

STEPS = 4


def gradient_at(step: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype) / (1 + step)


def weights(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype).requires_grad_()


def walked(optimizer: torch.optim.Optimizer, theta: torch.Tensor, step: int) -> torch.Tensor:
    """Torch's own step; returns the gradient it was taken on."""
    g = gradient_at(step, theta)
    theta.grad = g.clone()
    optimizer.step()
    return g


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_chain_of_adamw_steps_needs_torch_only_for_the_gradients(amsgrad: bool, maximize: bool):
    group: dict[str, Any] = {"lr": NOMINAL, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    theta = weights()
    optimizer = torch.optim.AdamW([theta], amsgrad=amsgrad, foreach=False, **group)
    g = walked(optimizer, theta, 0)
    mine, state = theta.detach().clone(), state_of(optimizer.state[theta])
    for step in range(1, STEPS):
        g = walked(optimizer, theta, step)
        taken = NextStep(g, mine, state, hyperparameters_of(group)._replace(amsgrad=amsgrad))
        mine, state = mine + NOMINAL * taken.direction, taken.after
        expected = state_of(optimizer.state[theta])
        assert state.step == expected.step and (state.max_exp_avg_sq is not None) == amsgrad
        torch.testing.assert_close(tuple(state[1 : 3 + amsgrad]), tuple(expected[1 : 3 + amsgrad]), rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, theta.detach(), rtol=1e-12, atol=1e-14)


def test_plain_adam_has_its_decay_in_the_moments():
    theta = weights()
    optimizer = torch.optim.Adam([theta], lr=NOMINAL, weight_decay=0.3, foreach=False)
    walked(optimizer, theta, 0)
    before, state = theta.detach().clone(), state_of(optimizer.state[theta])
    group = {"lr": NOMINAL, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.3}
    taken = NextStep(gradient_at(1, theta), before, state, hyperparameters_of(group)._replace(decoupled=False))
    walked(optimizer, theta, 1)
    torch.testing.assert_close(
        tuple(taken.after[1:3]), tuple(state_of(optimizer.state[theta])[1:3]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_buffer_of_sgd(nesterov: bool):
    dampening = 0.0 if nesterov else 0.2
    settings = {"momentum": 0.7, "dampening": dampening, "nesterov": nesterov, "weight_decay": 0.1}
    theta = weights()
    optimizer = torch.optim.SGD([theta], lr=0.05, foreach=False, **settings)
    walked(optimizer, theta, 0)
    mine, state = theta.detach().clone(), SGDState(0, optimizer.state[theta]["momentum_buffer"].clone())
    for step in range(1, STEPS):
        taken = SGDStep(walked(optimizer, theta, step), mine, state, SGDHyperparameters(**settings))
        mine, state = mine + 0.05 * taken.direction, taken.after
        torch.testing.assert_close(state.momentum_buffer, optimizer.state[theta]["momentum_buffer"], rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, theta.detach(), rtol=1e-12, atol=1e-14)
    assert SGDStep(mine, mine, SGDState(0), SGDHyperparameters(0.0, 0.0, False, 0.1)).after == SGDState(1)


def test_the_momentum_buffer_of_muon():
    theta = weights()
    optimizer = torch.optim.Muon([theta], lr=0.05, momentum=0.9, weight_decay=0.0)
    walked(optimizer, theta, 0)
    mine, state = theta.detach().clone(), MuonState(0, optimizer.state[theta]["momentum_buffer"].clone())
    group = optimizer.param_groups[0]
    hyperparameters = MuonHyperparameters(
        momentum=0.9,
        nesterov=group["nesterov"],
        weight_decay=0.0,
        coefficients=tuple(group["ns_coefficients"]),
        ns_steps=group["ns_steps"],
        eps=group["eps"],
        match_rms_adamw=False,
    )
    taken = MuonStep(walked(optimizer, theta, 1), mine, state, hyperparameters)
    torch.testing.assert_close(
        taken.after.momentum_buffer, optimizer.state[theta]["momentum_buffer"], rtol=1e-12, atol=0
    )


def test_a_step_of_narrow_weights_rounds_its_moments_as_torch_does():
    theta = weights(torch.bfloat16)
    optimizer = torch.optim.AdamW([theta], lr=NOMINAL, foreach=False)
    walked(optimizer, theta, 0)
    before, state = theta.detach().double(), state_of(optimizer.state[theta])
    g = gradient_at(1, theta)
    group = {"lr": NOMINAL, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    wide = AdamState(state.step, state.exp_avg.double(), state.exp_avg_sq.double())
    found = rounded_step(g, before, wide, hyperparameters_of(group), NOMINAL, torch.bfloat16, False)
    walked(optimizer, theta, 1)
    after = state_of(optimizer.state[theta])
    assert torch.equal(before + found.change, theta.detach().double()) and found.after.step == 2
    assert torch.equal(found.after.exp_avg, after.exp_avg.double())
    assert torch.equal(found.after.exp_avg_sq, after.exp_avg_sq.double())


def test_a_rule_says_whether_it_knows_its_next_state():
    assert {name for name, rule in RULES.items() if rule.has_after} == {
        name for name, rule in RULES.items() if hasattr(rule.next_step, "after")
    }
    assert not RULES["lion"].has_after and not RULES["adafactor"].has_after
