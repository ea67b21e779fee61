"""E read block by block: what all blocks come to is what one block of everything comes to, in little memory."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch
from enumeration import columns_of
from torch import Tensor

from entropy_core.estimates import blocks, measurement
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured, Moved, MovedTokens
from entropy_core.estimates.rows import change_of
from entropy_core.numerics import ragged, weighted_first_order
from entropy_core.numerics.choices import Baseline, Estimator
from entropy_core.numerics.functional import FUNCTIONALS, Columns, Functional, TokenPair, Tokens
from entropy_core.numerics.quadrature import NODES
from entropy_core.numerics.token_statistics import TokenDerivatives

LENGTHS = [3, 1, 2, 6, 4, 1, 1, 2, 5, 7, 3, 2]
OFFSETS = ragged.offsets_from_lengths(torch.tensor(LENGTHS))
K = sum(LENGTHS)
CUTS = {"one": [0, 12], "several": [0, 1, 3, 5, 7, 12], "the longest first": [0, 10, 11, 12]}
PROMPTS = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1, 6, 7, 8, 2])


def columns(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, K, generator=torch.Generator().manual_seed(seed)))


AT_THETA = [-columns(1, 0)[0].abs(), columns(1, 1)[0].abs(), *columns(2, 2)]
MOVED = [AT_THETA[0] + 0.3 * columns(1, 3)[0], AT_THETA[1] + 0.1 * columns(1, 4)[0].abs()]
OF_NODES = [[MOVED[0] * 0.9, MOVED[1], *columns(2, 5 + j)] for j in range(len(NODES))]


def cut(cuts: list[int]) -> Iterator[tuple[slice, Tensor]]:
    for start, stop in pairwise(cuts):
        yield slice(int(OFFSETS[start]), int(OFFSETS[stop])), OFFSETS[start : stop + 1] - OFFSETS[start]


def blocks_of(cuts: list[int]) -> list[Callable[[], Tokens]]:
    """Each reads copies of its own, as from a disk."""
    return [
        lambda of=of, offsets_N1=offsets_N1: tokens_of([x_K[of].clone() for x_K in AT_THETA], offsets_N1)
        for of, offsets_N1 in cut(cuts)
    ]


def tokens_of(columns: list[Tensor], offsets_N1: Tensor) -> Tokens:
    return Tokens(*columns[:2], offsets_N1, TokenPair(*columns[2:]))


def moved(cuts: list[int], eta: float = 0.5) -> Moved:
    def read() -> Iterator[MovedTokens]:
        for of, _ in cut(cuts):
            at_nodes = tuple(TokenDerivatives(*(x_K[of].clone() for x_K in node)) for node in OF_NODES)
            yield MovedTokens(MOVED[0][of].clone(), MOVED[1][of].clone(), at_nodes)

    return Moved(eta, read)


def batch_of(cuts: list[int], baseline: Baseline = "time_loo", clusters_N: Tensor | None = None) -> EvaluationBatch:
    return EvaluationBatch.of(blocks_of(cuts), clusters_N, baseline)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("clusters_N", [None, PROMPTS], ids=["sequences", "prompts"])
@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("cuts", CUTS)
def test_the_derivative_is_that_of_all_sequences_together(cuts: str, baseline: Baseline, clusters_N: Tensor | None):
    found, expected = (batch_of(CUTS[name], baseline, clusters_N) for name in (cuts, "one"))
    same(found.columns, expected.columns)
    same(found.weighted_columns, expected.weighted_columns)
    close(found.score_N, expected.score_N)
    assert (len(found), found.units) == (12, 12 if clusters_N is None else 9)
    whole = tokens_of(AT_THETA, OFFSETS)
    if baseline != "ridge":  # by the functions that know of no blocks
        same(found.columns, columns_of(whole, baseline))
    same(found.weighted_columns, {f: weighted_first_order.weighted_columns(f, whole) for f in FUNCTIONALS})


def same(found: dict[Functional, Columns], expected: dict[Functional, Columns]) -> None:
    assert found.keys() == expected.keys() == set(FUNCTIONALS)
    for functional, of in expected.items():
        close(tuple(found[functional]), tuple(of))


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("cuts", ["several", "the longest first"])
def test_so_is_the_change(cuts: str, estimator: Estimator):
    found, expected = (measured(CUTS[name], estimator) for name in (cuts, "one"))
    close(found.weights_N, expected.weights_N)
    assert found.usable and found.ess_prefix == pytest.approx(expected.ess_prefix, rel=1e-12)
    assert 1 < found.ess_prefix < 11.9
    for normalization in ("per_token", "per_sequence"):
        ours, theirs = (
            change_of(batch_of(CUTS[name]), there, 0.5, estimator, normalization)
            for name, there in ((cuts, found), ("one", expected))
        )
        close(ours.influence_N, theirs.influence_N)
        assert ours.value == pytest.approx(theirs.value, rel=1e-11)
        assert abs(ours.value) > 1e-4


def measured(cuts: list[int], estimator: Estimator) -> Measured:
    return measurement.measured(batch_of(cuts), moved(cuts), estimator)


def test_nothing_moved_is_nothing_changed():
    batch = batch_of(CUTS["several"])
    there = measurement.measured(batch, Moved(0.0, lambda: ()), "per_decision")
    change = change_of(batch, there, 0.0, "per_decision", "per_token")
    assert change.value == 0.0 and not change.influence_N.any()
    assert there.ess_prefix == pytest.approx(12, rel=1e-14)


def test_a_weight_that_overflows_in_any_block_makes_all_of_them_unusable():
    def read() -> Iterator[MovedTokens]:
        for i, (of, _) in enumerate(cut(CUTS["several"])):
            yield MovedTokens(MOVED[0][of] + (900.0 if i == 3 else 0.0), MOVED[1][of])

    there = measurement.measured(batch_of(CUTS["several"]), Moved(0.5, read), "per_decision")
    assert not there.usable and there.ess_prefix == 0.0


@pytest.mark.parametrize("count", [1, 3, 4, 12])
def test_the_first_sequences_keep_the_baselines_that_they_have_in_the_whole(count: int):
    whole = batch_of(CUTS["several"])
    first = whole.first(count)
    assert len(first) == count
    same(first.columns, {f: Columns(*(column_N[:count] for column_N in of)) for f, of in whole.columns.items()})
    assert whole.first(count).units == count


def test_one_block_of_a_large_batch_is_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks, "KEPT_BYTES", 0)
    alive: list[weakref.ref] = []
    most = 0

    def watched(block: Callable[[], Tokens]) -> Callable[[], Tokens]:
        def read() -> Tokens:
            nonlocal most
            tokens = block()
            alive.append(weakref.ref(tokens.logprobs_K))
            most = max(most, sum(of() is not None for of in alive))
            return tokens

        return read

    cuts = list(range(13))
    for baseline in get_args(Baseline):
        batch = EvaluationBatch.of([watched(block) for block in blocks_of(cuts)], None, baseline)
        assert len(batch) == len(batch.weighted_columns[FUNCTIONALS[0]].total_N) == len(batch.score_N) == 12
        for estimator in get_args(Estimator):
            assert measurement.measured(batch, moved(cuts), estimator).usable
    assert len(alive) > 12 * 20 and most <= 2  # the next one is read before the last one is let go of


def test_blocks_that_fit_are_read_once_and_the_others_in_each_pass(monkeypatch):
    read: list[int] = []

    def load(size: int) -> tuple[Tensor, dict[str, Tensor]]:
        read.append(size)
        return torch.zeros(size, dtype=torch.float64), {"b": torch.zeros(size, dtype=torch.float64)}

    monkeypatch.setattr(blocks, "KEPT_BYTES", 16 * 7)
    kept = blocks.Kept([partial(load, size) for size in (3, 5, 4, 1)])
    for _ in range(3):
        assert [len(x_K) for x_K, _ in kept()] == [3, 5, 4, 1]
    assert read == [3, 5, 4, 1, 5, 1, 5, 1]  # 3 and 4 fill the room
    first, other = kept(), kept()  # two passes at a time
    assert next(first)[0] is next(other)[0]
