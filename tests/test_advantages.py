"""Advantages by hand and by loops."""

import statistics

import pytest
import torch
from torch import Tensor

from entropy_core.numerics.advantages import Loss, group_advantages

CENTRED: list[Loss] = ["grpo", "dr_grpo", "dapo", "rloo"]


def rewards(P: int = 4, G: int = 5) -> Tensor:
    return torch.randn(P, G, dtype=torch.float64)


def test_by_hand():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)  # mean 1/4; Σ(r − mean)²/(G − 1) = 1/4
    for loss, expected in {
        "dr_grpo": [0.75, -0.25, -0.25, -0.25],
        "rloo": [1.0, -1 / 3, -1 / 3, -1 / 3],
        "grpo": [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001],
        "dapo": [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001],
        "reinforce": [1.0, 0.0, 0.0, 0.0],
    }.items():
        torch.testing.assert_close(
            group_advantages(rewards_PG, loss), torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=1e-16
        )


def test_the_division_by_the_deviation_can_be_switched_by_itself():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for loss, scaling, first in (
        ("dr_grpo", "group", 0.75 / 0.5001),
        ("rloo", "group", 1.0 / 0.5001),
        ("grpo", "none", 0.75),
        ("dapo", "none", 0.75),
        ("grpo", "group", 0.75 / 0.5001),
        ("dr_grpo", "none", 0.75),
    ):
        assert group_advantages(rewards_PG, loss, scaling)[0, 0] == pytest.approx(first, rel=1e-14)


def test_standardised_within_the_group_by_its_sample_deviation():
    rewards_PG = rewards()
    expected = [
        [(r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) for r in group]
        for group in rewards_PG.tolist()
    ]
    torch.testing.assert_close(
        group_advantages(rewards_PG, "grpo"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


def test_leave_one_out():
    rewards_PG = rewards()
    expected = [
        [r - statistics.fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)] for group in rewards_PG.tolist()
    ]
    torch.testing.assert_close(
        group_advantages(rewards_PG, "rloo"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("loss", CENTRED)
def test_a_group_knows_nothing_of_the_others_and_its_advantages_cancel(loss: Loss):
    rewards_PG = rewards()
    together_PG = group_advantages(rewards_PG, loss)
    torch.testing.assert_close(together_PG.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(group_advantages(rewards_PG[2:3], loss), together_PG[2:3])
    torch.testing.assert_close(group_advantages(rewards_PG + 7.0, loss), together_PG, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", CENTRED)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -1e6 / 7])
@pytest.mark.parametrize("G", [2, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(loss: Loss, reward: float, G: int):
    rewards_PG = torch.stack([torch.full((G,), reward, dtype=torch.float64), torch.arange(G, dtype=torch.float64)])
    advantages_PG = group_advantages(rewards_PG, loss)
    assert (advantages_PG[0] == 0).all()
    assert (advantages_PG[1] != 0).sum() >= G - 1


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="at least two responses per prompt, got 1"):
        group_advantages(rewards(4, 1), "grpo")
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        group_advantages(rewards(), "ppo")
