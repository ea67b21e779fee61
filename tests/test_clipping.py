"""Clipped ratios against the formula of PPO; and which responses the off-policy mask leaves out."""

import pytest
import torch

from entropy_core.numerics.clipping import OffPolicy, clipped, clipped_ratio, kept_responses

RATIOS = torch.linspace(0.4, 2.4, 41, dtype=torch.float64)


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("delta", [None, 1.1, 1.7])
def test_the_clipped_ratio_is_that_of_ppo(sign: float, delta: float | None):
    rule = OffPolicy(0.2, 0.3, delta)
    advantages = torch.full_like(RATIOS, sign)
    ratio = RATIOS.clone().requires_grad_()
    found = sign * clipped_ratio(ratio, advantages, rule)
    upper = RATIOS if delta is None else RATIOS.clamp(max=delta)
    expected = torch.minimum(sign * upper, sign * RATIOS.clamp(0.8, 1.3))
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), ratio)
    cut = clipped(RATIOS, advantages, rule)
    edges = torch.isclose(RATIOS[:, None], torch.tensor([0.8, 1.3, 1.1, 1.7]).double()).any(1)
    assert torch.equal((slope == 0)[~edges], (cut.any | (advantages == 0))[~edges])
    assert cut.low.any() == (sign < 0) and cut.high.any() == (sign > 0)
    assert cut.dual.any() == (sign < 0 and delta is not None)


def test_only_responses_of_negative_advantage_are_left_out():
    drift_N = torch.tensor([0.0, 0.5, 0.5, 0.5, -3.0]).double()
    advantages_N = torch.tensor([-1.0, -1.0, 0.0, 1.0, -1.0]).double()
    assert kept_responses(drift_N, advantages_N, 0.1).tolist() == [True, False, True, True, True]
