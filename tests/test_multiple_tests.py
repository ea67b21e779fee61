"""Adjusted p-values: against scipy, and against what they promise."""

import pytest
import torch
from scipy import stats

from entropy_core.numerics.multiple_tests import benjamini_hochberg, holm


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == benjamini_hochberg([]) == []


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_benjamini_and_hochberg_as_in_scipy(size):
    p = torch.rand(size, generator=torch.Generator().manual_seed(size)).double()
    assert benjamini_hochberg(p.tolist()) == pytest.approx(stats.false_discovery_control(p.numpy()).tolist())


def test_what_they_promise():
    """10 checkpoints, 5 of them without an effect: any false one in 5 %, and a false share of 5 %, at most."""
    generator, any_false, false_shares = torch.Generator().manual_seed(0), [], []
    for _ in range(2000):
        z = torch.randn(10, generator=generator) + torch.tensor([0.0] * 5 + [3.0] * 5)
        p = (2 * stats.norm.sf(z.abs().numpy())).tolist()
        any_false.append(min(holm(p)[:5]) <= 0.05)
        found = [i for i, q in enumerate(benjamini_hochberg(p)) if q <= 0.05]
        false_shares.append(sum(i < 5 for i in found) / max(1, len(found)))
    assert 0.01 < sum(any_false) / 2000 <= 0.06
    assert 0.01 < sum(false_shares) / 2000 <= 0.04  # a half of the tests are of no effect
