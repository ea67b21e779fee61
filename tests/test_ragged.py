"""Sums within sequences, against loops over Python lists."""

import math
import weakref

import pytest
import torch

from entropy_core.numerics import ragged

LENGTHS = [[1], [4], [3, 1, 4, 1, 5], [1] * 6, [2, 0, 3, 0], [0, 2], []]


def as_lists(lengths: list[int]) -> list[list[float]]:
    numbers = torch.randn(sum(lengths), dtype=torch.float64).tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [numbers[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def flatten(lists: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for values in lists for x in values], dtype=torch.float64)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sums_are_those_of_a_loop(lengths: list[int]):
    lists = as_lists(lengths)
    offsets_N1 = ragged.offsets_from_lengths(torch.tensor(lengths, dtype=torch.long))
    values_K = flatten(lists)
    before = [[math.fsum(values[:k]) for k in range(len(values))] for values in lists]
    after = [[math.fsum(values[k + 1 :]) for k in range(len(values))] for values in lists]
    totals = torch.tensor([math.fsum(values) for values in lists], dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(ragged.sequence_sum(values_K, offsets_N1), totals, **close)
    torch.testing.assert_close(ragged.sum_before(values_K, offsets_N1), flatten(before), **close)
    torch.testing.assert_close(ragged.sum_after(values_K, offsets_N1), flatten(after), **close)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_indices_are_those_of_a_loop(lengths: list[int]):
    offsets_N1 = ragged.offsets_from_lengths(torch.tensor(lengths, dtype=torch.long))
    assert offsets_N1.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert ragged.lengths(offsets_N1).tolist() == lengths
    assert ragged.sequence_index(offsets_N1).tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert ragged.position_index(offsets_N1).tolist() == [k for n in lengths for k in range(n)]


def test_nothing_is_before_the_first_token_and_nothing_after_the_last():
    lengths_N = torch.randint(1, 9, (200,))
    offsets_N1 = ragged.offsets_from_lengths(lengths_N)
    values_K = torch.rand(int(offsets_N1[-1])) * 1e3
    assert (ragged.sum_before(values_K, offsets_N1)[offsets_N1[:-1]] == 0).all()
    ones_K = torch.ones_like(values_K)
    assert torch.equal(ragged.sum_before(ones_K, offsets_N1), ragged.position_index(offsets_N1).double())
    assert (ragged.sum_after(ones_K, offsets_N1)[offsets_N1[1:] - 1] == 0).all()
    assert ragged.sum_after(values_K, offsets_N1)[offsets_N1[1:] - 1].abs().max() < 1e-9


@pytest.mark.parametrize("function", [ragged.sequence_sum, ragged.sum_before, ragged.sum_after])
def test_float32_is_summed_in_float64(function):
    values_K = torch.tensor([1e8, 1.0, 1.0, -1e8, 0.5], dtype=torch.float32)  # 1e8 + 1 is not a float32
    result = function(values_K, torch.tensor([0, 5]))
    assert result.dtype == torch.float64
    assert torch.equal(result, function(values_K.double(), torch.tensor([0, 5])))
    assert float(ragged.sequence_sum(values_K, torch.tensor([0, 5]))) == 2.5


def test_batches_laid_one_after_the_other():
    parts = [[3, 1], [2], [5, 1, 1]]
    offsets = [ragged.offsets_from_lengths(torch.tensor(part)) for part in parts]
    assert ragged.lengths(ragged.concatenate(offsets)).tolist() == [3, 1, 2, 5, 1, 1]


def test_indices_are_kept_as_long_as_the_offsets():
    offsets_N1 = torch.tensor([0, 2, 2, 5])
    for index in (ragged.sequence_index, ragged.position_index):
        assert index(offsets_N1) is index(offsets_N1)
        assert index(offsets_N1) is not index(offsets_N1.clone())
    kept = [weakref.ref(index(offsets_N1)) for index in (ragged.sequence_index, ragged.position_index)]
    assert all(one() is not None for one in kept)
    del offsets_N1
    assert [one() for one in kept] == [None, None]
