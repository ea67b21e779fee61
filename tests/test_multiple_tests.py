"""Adjusted p-values: Holm against values by hand, Benjamini and Hochberg against scipy, both against simulation."""

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


def test_error_rates_are_controlled():
    """Half of 10 tests have no effect. Holm: P(any false positive) ≤ 5 %; BH: E[false share] ≤ 5 % · 5/10 = 2.5 %.

    The upper bounds leave room for the error of 2,000 draws; the lower ones rule out a needlessly strict method.
    """
    generator, any_false, false_shares = torch.Generator().manual_seed(0), [], []
    for _ in range(2000):
        z = torch.randn(10, generator=generator) + torch.tensor([0.0] * 5 + [3.0] * 5)
        p = (2 * stats.norm.sf(z.abs().numpy())).tolist()
        any_false.append(min(holm(p)[:5]) <= 0.05)
        found = [i for i, q in enumerate(benjamini_hochberg(p)) if q <= 0.05]
        false_shares.append(sum(i < 5 for i in found) / max(1, len(found)))
    assert 0.01 < sum(any_false) / 2000 <= 0.06
    assert 0.01 < sum(false_shares) / 2000 <= 0.04
