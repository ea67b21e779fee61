"""Fieller's interval of a ratio, by its definition, and how often it covers."""

import pytest
import torch

from entropy_core.numerics import uncertainty
from entropy_core.numerics.fieller import Moments, ratio_interval


def test_fiellers_ends_are_where_the_difference_is_at_its_quantile():
    moments = Moments(-0.8, 0.3, 0.04, 0.002, -0.003)
    ends = ratio_interval(moments, 2.0)
    assert ends is not None and ends[0] < -0.8 / 0.3 < ends[1]
    for ratio in ends:
        variance_of = 0.04 - 2 * ratio * -0.003 + ratio**2 * 0.002
        assert (-0.8 - ratio * 0.3) ** 2 == pytest.approx(4.0 * variance_of, rel=1e-12)


def test_a_denominator_that_may_be_zero_allows_any_ratio():
    assert ratio_interval(Moments(-0.8, 0.3, 0.04, 0.03, 0.0), 2.0) is None
    assert ratio_interval(Moments(1.0, 0.0, 0.0, 0.0, 0.0), 2.0) is None


def test_fiellers_interval_covers_as_it_says():
    generator = torch.Generator().manual_seed(3)
    mix = torch.tensor([[1.0, 0.0], [0.7, 0.9]], dtype=torch.float64)
    found = torch.randn(20_000, 2, generator=generator, dtype=torch.float64) @ mix + torch.tensor([4.0, 5.0])
    covariance = mix.T @ mix
    moments = (Moments(float(a), float(b), *(float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1)))) for a, b in found)
    intervals = [ratio_interval(one, uncertainty.normal_quantile(0.95)) for one in moments]
    inside = sum(ends is None or ends[0] <= 0.8 <= ends[1] for ends in intervals) / len(intervals)
    assert abs(inside - 0.95) <= 4 * (0.95 * 0.05 / len(intervals)) ** 0.5
