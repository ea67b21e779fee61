"""Pareto k̂ and the tails of Student's t and χ², against the libraries that take long to import."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from entropy_core.estimates.distributions import chi_squared_tail, t_quantile, t_tail
from entropy_core.estimates.pareto import FEWEST, pareto_k


@pytest.mark.parametrize("N", [FEWEST, 26, 224, 226, 1000])
@pytest.mark.parametrize("spread", [1e-6, 0.3, 3.0])
def test_k_is_that_of_arviz_whatever_the_scale_of_the_weights(N, spread):
    log_weights_N = spread * torch.randn(N, dtype=torch.float64)
    _, expected = array_stats.psislw(-log_weights_N.numpy())
    for scale in (-20.0, 0.0, 5.0):
        assert pareto_k((log_weights_N + scale).exp()) == pytest.approx(float(expected), abs=1e-8)


def test_k_of_a_pareto_distribution_is_its_shape():
    weights_N = torch.rand(200_000, dtype=torch.float64) ** -0.6
    assert pareto_k(weights_N) == pytest.approx(0.6, abs=0.1)


def test_no_k_for_few_weights_or_for_a_tail_of_ties():
    assert pareto_k(torch.rand(FEWEST - 1, dtype=torch.float64)) is None
    assert pareto_k(torch.ones(100, dtype=torch.float64)) is None
    mostly_tied = torch.ones(100, dtype=torch.float64)
    mostly_tied[:3] = 2.0
    assert pareto_k(mostly_tied) is None
    for above in range(30, 50):  # a tail of 48, of which the lowest are equal to the weight below it
        tied = torch.ones(256, dtype=torch.float64)
        tied[:above] = torch.linspace(1.1, 2.0, above)
        assert (pareto_k(tied) is None) == (above < 37)


@pytest.mark.parametrize("degrees_of_freedom", [1, 7, 12.5, 1000, math.inf])
def test_quantiles_and_tails(degrees_of_freedom):
    for value in (-2.0, 0.0, 0.3, 4.0, math.inf):
        assert t_tail(value, degrees_of_freedom) == pytest.approx(stats.t.sf(value, degrees_of_freedom), rel=1e-12)
    for probability in (0.001, 0.5, 0.975):
        expected = stats.t.ppf(probability, degrees_of_freedom)
        assert t_quantile(probability, degrees_of_freedom) == pytest.approx(expected, rel=1e-12)
    if degrees_of_freedom < math.inf:
        assert chi_squared_tail(3.3, degrees_of_freedom) == pytest.approx(stats.chi2.sf(3.3, degrees_of_freedom))


def test_without_degrees_of_freedom_there_is_no_quantile():
    assert np.isnan(t_quantile(0.9, 0)) and np.isnan(t_tail(1.0, 0))
