"""Steps on halves of U: the splits are orthogonal, the variances right for any step, and the rules as they say."""

import math

import pytest
import torch

from entropy_core.numerics.half_samples import FEWEST, HalfSteps, balanced_halves, half_steps, over_u


@pytest.mark.parametrize(
    ("prompts", "splits"), [(1, 0), (2, 1), (3, 1), (4, 3), (7, 3), (8, 7), (9, 7), (64, 7), (100, 7)]
)
def test_the_splits_are_balanced(prompts: int, splits: int):
    first_RP = balanced_halves(prompts)
    assert first_RP.shape == (splits, prompts)
    for row_P in first_RP:
        assert abs(2 * int(row_P.sum()) - prompts) <= 4
    if prompts % 8 == 0:
        signs_RP = 2 * first_RP.long() - 1
        assert torch.equal(signs_RP @ signs_RP.T, prompts * torch.eye(splits, dtype=torch.int64))


def both_halves(x_P: torch.Tensor, f) -> tuple[torch.Tensor, torch.Tensor]:
    first_RP = balanced_halves(len(x_P))
    values_R2 = torch.stack([torch.stack([f(x_P[row_P].mean()), f(x_P[~row_P].mean())]) for row_P in first_RP])
    return values_R2, torch.stack([first_RP.sum(1), (~first_RP).sum(1)], 1)


def test_for_a_linear_step_it_is_the_variance_between_the_groups():
    x_P = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = half_steps(float(3 * x_P.mean() + 1), *both_halves(x_P, lambda mean: 3 * mean + 1))
    groups_K = torch.stack([x_P[k::8].mean() for k in range(8)])
    assert found.variance == pytest.approx(9 * float(groups_K.var()) / 8, rel=1e-12)
    assert found.variance_of_half == pytest.approx(2 * found.variance, rel=1e-12)
    assert found.nonlinearity < 1e-20 and found.splits == 7
    uneven_P = x_P[:61]
    found = half_steps(float(uneven_P.mean()), *both_halves(uneven_P, lambda mean: mean))
    assert found.nonlinearity < 1e-20


@pytest.mark.parametrize("f", [torch.sign, torch.tanh, lambda mean: mean, lambda mean: 10 * mean * mean])
def test_the_variance_of_half_is_unbiased_for_any_step(f):
    """Of f at the mean of 8 standard normal numbers with a shift, against its variance over means of 4."""
    generator = torch.Generator().manual_seed(1)
    x_B8 = 0.3 + torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    found = torch.tensor([half_steps(float(f(x_8.mean())), *both_halves(x_8, f)).variance_of_half for x_8 in x_B8])
    expected = f(0.3 + torch.randn(400_000, generator=generator, dtype=torch.float64) / 2).var()
    assert abs(float(found.mean() - expected)) < 4 * float(found.std()) / math.sqrt(4000) + 0.01 * float(expected)


def test_without_a_split_nothing_is_known():
    found = half_steps(1.0, torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.int64))
    assert found.splits == 0 and math.isnan(found.variance)
    assert "0 prompts" in over_u(float("nan"), 0.0, found, 1, 0).invalid
    assert "the loss of one half has no finite gradient" in over_u(0.3, 0.0, found, 64, 50).invalid


def steps(nonlinearity: float) -> HalfSteps:
    return HalfSteps(7, variance=0.04, variance_of_half=0.08, nonlinearity=nonlinearity)


def test_a_linear_step_has_the_linearised_error():
    assert over_u(0.3, 0.01, steps(0.01), 64, 50) == (0.3, 63, 0.01, "")


@pytest.mark.parametrize(
    ("nonlinearity", "variance"), [(0.0101, 0.04 * 1.202), (0.025, 0.06), (0.05, 0.08), (3.0, 0.08)]
)
def test_a_bent_step_has_that_of_halves_and_relies_less_on_a_law_of_large_numbers(nonlinearity, variance):
    found = over_u(0.003, 0.01, steps(nonlinearity), 64, 50)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-12)
    assert found[1:] == (7, 0.0, "")


@pytest.mark.parametrize(
    ("nonlinearity", "informative", "valid"),
    [
        (0.0, FEWEST, True),
        (0.0, FEWEST - 1, False),
        (0.0, 0, False),
        (0.1, 15, False),
        (0.1, 16, True),
        (math.inf, 50, False),
    ],
)
def test_where_there_is_no_valid_interval_there_is_a_reason(nonlinearity, informative, valid):
    assert (over_u(0.3, 0.0, steps(nonlinearity), 64, informative).invalid == "") is valid


def test_there_is_no_valid_interval_where_the_rule_of_the_optimizer_allows_none():
    assert over_u(0.3, 0.0, steps(0.0)._replace(no_interval="only signs"), 64, 50).invalid == "only signs"


def test_there_is_no_valid_interval_for_the_first_step_of_an_optimizer():
    assert "has made no step yet" in over_u(0.3, 0.0, steps(0.0)._replace(fresh=True), 64, 50).invalid
