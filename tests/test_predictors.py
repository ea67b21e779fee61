"""Predictors by hand, and exact where they were derived: one state, logits of its own, a plain step."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from entropy_core.numerics.predictors import (
    Agreement,
    agreement,
    discriminator,
    points_needed,
    rank_correlation,
    slope_standard_error,
    token_covariance,
    weighted_token_covariance,
)
from entropy_core.numerics.token_statistics import expected_discriminator

COUNTS = [8, 4, 3, 1]  # of 16: how often each action is taken, in exact proportion to its probability


class State:
    """One state with four actions; each occurs among the tokens exactly as often as the policy says."""

    def __init__(self, centred: bool):
        self.p_V = torch.tensor(COUNTS, dtype=torch.float64) / 16
        self.logits_V = self.p_V.log() + 0.7
        self.tokens_K = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
        self.logprobs_K = self.p_V.log()[self.tokens_K]
        self.advantages_V = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=torch.float64)
        if centred:
            self.advantages_V = self.advantages_V - self.p_V @ self.advantages_V
        self.advantages_K = self.advantages_V[self.tokens_K]
        self.entropies_K = torch.full((16,), float(self.entropy(self.logits_V)), dtype=torch.float64)
        self.expected_K = expected_discriminator(self.logits_V.unsqueeze(0), 1.0).expand(16)

    @staticmethod
    def entropy(logits_V: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=logits_V).entropy()

    def change_along(self, dlogits_V: Tensor) -> float:
        """First-order change of the entropy, by autograd."""
        return float(torch.func.jvp(self.entropy, (self.logits_V,), (dlogits_V,))[1])

    def policy_gradient(self) -> Tensor:
        """∇_z Σ_a π(a) A(a), by autograd."""
        return torch.func.grad(lambda z: torch.softmax(z, 0) @ self.advantages_V)(self.logits_V)

    def discriminator(self) -> float:
        return discriminator(self.logprobs_K, self.entropies_K, self.advantages_K, self.expected_K)


def test_covariances_by_hand():
    logprobs_K = torch.tensor([0.5, 0.25, 0.125]).log()
    advantages_K = torch.tensor([2.0, 0.0, 1.0])
    # log₂π = −1, −2, −3 about −2; A about 1: (1·1 + 0·(−1) + (−1)·0)/3 = 1/3
    assert token_covariance(logprobs_K, advantages_K) == pytest.approx(-math.log(2) / 3, rel=1e-6)
    # πA = 1, 0, 1/8 about 3/8: (5/8 + 1/4)/3
    assert weighted_token_covariance(logprobs_K, advantages_K) == pytest.approx(-math.log(2) * 7 / 24, rel=1e-6)


def test_the_discriminator_by_hand():
    logprobs_K = torch.tensor([0.5, 0.25]).log()
    found = discriminator(logprobs_K, torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.tensor([0.1, 0.2]))
    first, second = 0.5 * (1 + math.log(0.5)) - 0.1, 0.25 * (2 + math.log(0.25)) - 0.2
    assert found == pytest.approx(-(3 * first - second) / 2, rel=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_a_natural_policy_gradient_step_changes_the_entropy_by_the_covariance(centred: bool):
    state = State(centred)
    change = state.change_along(state.advantages_V)
    assert token_covariance(state.logprobs_K, state.advantages_K) == pytest.approx(change, rel=1e-12)
    assert abs(change) > 0.05


def test_a_policy_gradient_step_changes_the_entropy_by_the_weighted_covariance():
    state = State(centred=True)
    change = state.change_along(state.policy_gradient())
    assert weighted_token_covariance(state.logprobs_K, state.advantages_K) == pytest.approx(change, rel=1e-12)
    assert state.discriminator() == pytest.approx(change, rel=1e-12)
    assert abs(change) > 0.05


def test_only_the_discriminator_needs_no_centred_advantages():
    state = State(centred=False)
    change = state.change_along(state.policy_gradient())
    assert state.discriminator() == pytest.approx(change, rel=1e-12)
    assert abs(weighted_token_covariance(state.logprobs_K, state.advantages_K) - change) > 0.01


@pytest.mark.parametrize("token", range(4))
def test_a_reinforced_token_changes_the_entropy_of_its_state_by_the_discriminator(token: int):
    """z += α(e_k − π) changes h by −α(S* − E_π[S*])."""
    state = State(centred=False)
    change = state.change_along(torch.eye(4, dtype=torch.float64)[token] - state.p_V)
    one = [column[state.tokens_K == token][:1] for column in (state.logprobs_K, state.entropies_K)]
    found = discriminator(*one, torch.ones(1).double(), state.expected_K[:1])
    assert found == pytest.approx(change, rel=1e-12)
    assert abs(change) > 0.01


def test_agreement_is_a_regression_of_the_measured_on_the_predicted():
    predicted_C = torch.randn(30, dtype=torch.float64)
    measured_C = 0.4 * predicted_C + 0.3 * torch.randn(30, dtype=torch.float64) - 0.2
    line = stats.linregress(predicted_C.numpy(), measured_C.numpy())
    found = agreement(predicted_C, measured_C)
    assert found.slope == pytest.approx(line.slope, rel=1e-12)
    assert found.r_squared == pytest.approx(line.rvalue**2, rel=1e-12)
    same = [(p > 0) == (m > 0) for p, m in zip(predicted_C.tolist(), measured_C.tolist(), strict=True)]
    assert found.sign_accuracy == sum(same) / 30
    assert 0.5 < found.sign_accuracy < 1.0 and found.points == 30


def test_agreement_of_a_line_is_perfect():
    predicted_C = torch.tensor([1.0, -2.0, 3.0, 0.5])
    assert agreement(predicted_C, -3 * predicted_C) == pytest.approx(Agreement(-3.0, 1.0, 0.0, 4), rel=1e-6)


def test_agreement_of_nothing_is_none():
    nan, inf = math.nan, math.inf
    assert agreement(torch.tensor([]), torch.tensor([])) == Agreement(None, None, None, 0)
    assert agreement(torch.tensor([2.0]), torch.tensor([3.0])) == Agreement(None, None, 1.0, 1)
    assert agreement(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([1.0, -2.0, 4.0])) == (None, None, 2 / 3, 3)
    assert agreement(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.1, 0.1, 0.1]))[1:] == (None, 2 / 3, 3)
    holes = agreement(torch.tensor([1.0, nan, 2.0, 3.0, 9.0]), torch.tensor([2.0, 1.0, 4.0, 6.0, inf]))
    assert holes == pytest.approx(Agreement(2.0, 1.0, 1.0, 3), rel=1e-6)


def test_the_error_of_the_slope_and_the_ranks_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    for points in (3, 5, 8):
        x_C, y_C = torch.randn(2, points, generator=generator, dtype=torch.float64)
        line = stats.linregress(x_C.numpy(), y_C.numpy())
        assert slope_standard_error(x_C, y_C) == pytest.approx(line.stderr, rel=1e-10)
        assert slope_standard_error(x_C, y_C + 3.0) == pytest.approx(line.stderr, rel=1e-10)  # a shift that all share
        kendall = stats.kendalltau(x_C.numpy(), y_C.numpy(), method="exact")
        assert rank_correlation(x_C, y_C) == pytest.approx((kendall.statistic, kendall.pvalue), rel=1e-10)


def test_too_little_has_neither():
    two, equal, three = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 3.0, 2.0])
    assert slope_standard_error(two, two) is slope_standard_error(equal, three) is None
    assert (
        rank_correlation(two[:1], two[:1]) is rank_correlation(equal, three) is rank_correlation(three, equal) is None
    )
    assert rank_correlation(two, -two) == (-1.0, 1.0)  # two points are in order, or in the other one
    p_values = [rank_correlation(torch.arange(n), torch.arange(n)).p_value for n in (4, 5)]
    assert p_values[0] > 0.05 > p_values[1]


def test_how_many_points_a_correlation_needs():
    assert points_needed(0.0) is None and points_needed(1.0) == 4
    assert points_needed(0.5**2) == 30  # the usual table says 29 or 30
    assert points_needed(0.006) > 1000
