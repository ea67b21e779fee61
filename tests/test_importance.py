"""Prefix weights and the per-decision columns, against loops over tokens; what they estimate is in test_enumeration."""

import math

import pytest
import torch

from entropy_core.numerics import ragged
from entropy_core.numerics.functional import ENTROPY, LENGTH, Tokens
from entropy_core.numerics.importance import (
    effective_sample_size,
    log_totals,
    per_decision_column,
    prefix_effective_sample_sizes,
)
from entropy_core.numerics.weights import PrefixWeights, log_weights_are_usable, prefix_weights

LENGTHS = [3, 1, 4, 2]
OFFSETS = ragged.offsets_from_lengths(torch.tensor(LENGTHS))
K = sum(LENGTHS)


def probabilities() -> tuple[list[float], list[float]]:
    return (0.05 + 0.9 * torch.rand(2, K, dtype=torch.float64)).tolist()


def test_weights_are_products_of_ratios():
    old, new = probabilities()
    weights = prefix_weights(
        torch.tensor([math.log(p) for p in old], dtype=torch.float64),
        torch.tensor([math.log(p) for p in new], dtype=torch.float64),
        OFFSETS,
    )
    for i, (start, stop) in enumerate(zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)):
        for k in range(start, stop):
            before = math.prod(new[start:k]) / math.prod(old[start:k])
            assert float(weights.before_K[k]) == pytest.approx(before, rel=1e-12)
            assert float(weights.after_K[k]) == pytest.approx(before * new[k] / old[k], rel=1e-12)
        assert float(weights.sequence_N[i]) == pytest.approx(float(weights.after_K[stop - 1]), rel=1e-12)


def test_an_unmoved_policy_has_weights_of_exactly_one():
    logprobs_K = torch.randn(K, dtype=torch.float32)
    assert all((w == 1).all() and w.dtype == torch.float64 for w in prefix_weights(logprobs_K, logprobs_K, OFFSETS))
    moved_K = logprobs_K.clone()
    moved_K[:3] += 0.1  # the first sequence only: the others keep their weight, exactly
    weights = prefix_weights(logprobs_K, moved_K, OFFSETS)
    assert (
        (weights.before_K[3:] == 1).all() and (weights.after_K[3:] == 1).all() and (weights.sequence_N[1:] == 1).all()
    )


def test_columns_are_those_of_a_loop():
    old, new = probabilities()
    h, b, c = torch.randn(3, K, dtype=torch.float64).tolist()
    weights = prefix_weights(
        torch.tensor(old, dtype=torch.float64).log(), torch.tensor(new, dtype=torch.float64).log(), OFFSETS
    )
    moved = Tokens(torch.tensor(new, dtype=torch.float64).log(), torch.tensor(h, dtype=torch.float64), OFFSETS)
    S_N, T_N = (
        per_decision_column(functional, moved, weights, torch.tensor(base, dtype=torch.float64))
        for functional, base in ((ENTROPY, b), (LENGTH, c))
    )
    for i, (start, stop) in enumerate(zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)):
        S = T = 0.0
        rho = 1.0
        for k in range(start, stop):
            grown = rho * new[k] / old[k]
            S += rho * h[k] - b[k] * (grown - rho)
            T += rho - c[k] * (grown - rho)
            rho = grown
        assert float(S_N[i]) == pytest.approx(S, rel=1e-11, abs=1e-12)
        assert float(T_N[i]) == pytest.approx(T, rel=1e-11, abs=1e-12)


def test_effective_sample_size_counts_the_weights_that_count():
    assert effective_sample_size(torch.full((7,), 0.3, dtype=torch.float64)) == pytest.approx(7.0, rel=1e-14)
    assert effective_sample_size(torch.tensor([2.0, 2.0, 0.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_sample_size(torch.tensor([1.0, 1e-9, 1e-9])) == pytest.approx(1.0)
    huge_N = torch.tensor([1e200, 1e200, 1e-200], dtype=torch.float64)  # the square of a usable weight may overflow
    assert effective_sample_size(huge_N) == pytest.approx(2.0)
    # log-normal weights: N/(1 + cv²), cv² = e^{σ²} − 1
    w_N = (0.5 * torch.randn(100_000, dtype=torch.float64)).exp()
    assert effective_sample_size(w_N) / 100_000 == pytest.approx(math.exp(-0.25), rel=0.02)


def test_effective_sample_sizes_by_position():
    """Three sequences of 1, 3 and 2 tokens: at each position the weights of all three, finished or not."""
    ratios = [[2.0], [0.5, 4.0, 3.0], [1.0, 0.25]]
    offsets_N1 = torch.tensor([0, 1, 4, 6])
    moved_K = torch.tensor([math.log(r) for row in ratios for r in row], dtype=torch.float64)
    weights = prefix_weights(torch.zeros(6), moved_K, offsets_N1)
    at_each = [[1.0, 1.0, 1.0], [2.0, 0.5, 1.0], [2.0, 2.0, 0.25]]
    expected = [sum(w) ** 2 / sum(x**2 for x in w) for w in at_each]
    found_T = prefix_effective_sample_sizes(log_totals(weights, offsets_N1))
    assert found_T.dtype == torch.float64
    assert found_T.tolist() == pytest.approx(expected, rel=1e-13)
    assert found_T.tolist() == pytest.approx([effective_sample_size(torch.tensor(w)) for w in at_each], rel=1e-6)


def test_late_weights_of_any_size_leave_the_early_sample_sizes_alone():
    zero_K, moved_K = torch.zeros(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    moved_K[1], moved_K[5] = -400.0, 500.0  # sequences of 3 and 4 tokens, at their second
    found_T = prefix_effective_sample_sizes(log_totals(prefix_weights(zero_K, moved_K, OFFSETS), OFFSETS))
    assert found_T.tolist() == pytest.approx([4.0, 4.0, 1.0, 1.0], rel=1e-12)
    unmoved = prefix_weights(zero_K, zero_K, OFFSETS)
    assert prefix_effective_sample_sizes(log_totals(unmoved, OFFSETS)).tolist() == pytest.approx([4.0] * 4, rel=1e-14)


def test_weights_that_overflow_or_underflow_are_not_usable():
    def weights(log_ratio: float) -> PrefixWeights:
        zero_K = torch.zeros(K, dtype=torch.float64)
        moved_K = zero_K.clone()
        moved_K[4] = log_ratio
        return prefix_weights(zero_K, moved_K, OFFSETS)

    assert log_weights_are_usable(weights(5.0)) and log_weights_are_usable(weights(-5.0))
    assert not log_weights_are_usable(weights(800.0))
    assert not log_weights_are_usable(weights(-800.0))
