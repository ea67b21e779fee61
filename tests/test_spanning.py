"""Which gradients are computed, and what the others are made of."""

import torch

from entropy_core.numerics.spanning import LARGEST, combined, spanning

EPS = torch.finfo(torch.float32).eps


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_rest_are_combinations_of_as_few_as_possible():
    generator = torch.Generator().manual_seed(0)
    for independent in range(1, 8):
        base_BK = torch.randn(independent, 50, generator=generator, dtype=torch.float64)
        mixed_IB = torch.randn(20, independent, generator=generator, dtype=torch.float64)
        rows_IK = (mixed_IB @ base_BK) * 10.0 ** torch.arange(-10, 10)[:, None]  # of any length
        chosen, multiples_IB = spanning(list(rows_IK), [1.0] * 20)
        assert len(chosen) == independent
        norms_I = rows_IK.norm(dim=1)
        assert ((multiples_IB @ rows_IK[chosen] - rows_IK).norm(dim=1) <= 1e-12 * norms_I).all()
        assert (multiples_IB.abs() * norms_I[chosen] / norms_I[:, None] <= LARGEST + 1e-9).all()
        torch.testing.assert_close(multiples_IB[chosen], torch.eye(independent).double(), rtol=0, atol=1e-12)


def test_the_cheap_ones_are_computed():
    """Those of positive and of negative advantages, each on half of the responses, and not the run's on all of them."""
    positives, negatives = row(1, 2, 0, 0), row(0, 0, 1, 3)
    chosen, multiples_IB = spanning([positives + negatives, positives, negatives], [4, 2, 2])
    assert sorted(chosen) == [1, 2]
    torch.testing.assert_close(multiples_IB[0], row(1, 1), rtol=1e-14, atol=0)


def test_a_small_difference_is_not_blown_up():
    """Of three weights of a bonus the two that are close would give the third by a hundred times their difference."""
    run, bonus = row(1, -1, 2, 0), row(0, 1, 1, 1)
    chosen, multiples_IB = spanning([run, run + 0.001 * bonus, run + bonus], [1, 1, 2])
    assert len(chosen) == 2 and 2 in chosen and multiples_IB.abs().max() <= LARGEST


def test_no_pass_for_a_loss_that_is_0():
    chosen, multiples_IB = spanning([row(0, 0, 0), row(0, 0, 0)], [0, 0])
    assert chosen == [] and multiples_IB.shape == (2, 0)
    chosen, multiples_IB = spanning([row(0, 0, 0), row(1, 1, 1)], [0, 3])
    assert chosen == [1] and multiples_IB.flatten().tolist() == [0.0, 1.0]
    assert combined(multiples_IB[0], [row(1, 1)], row(0, 0), torch.float32).tolist() == [
        0,
        0,
    ]


def test_what_rounding_leaves_is_0():
    a = row(1, 1, 3)
    b = row(1 + 8 * EPS, 1 + 100 * EPS, 1)
    found = combined(row(1, -1), [a, b], row(0, 0, 0), torch.float32)
    assert found.tolist() == [0.0, -100 * EPS, 2.0]


def test_every_gradient_is_computed_where_one_is_not_finite():
    for bad in (torch.nan, torch.inf, 1e200):
        chosen, multiples_IB = spanning([row(bad, 1), row(1, 1), row(2, 2)], [1, 1, 1])
        assert chosen == [0, 1, 2] and torch.equal(multiples_IB, torch.eye(3).double())
