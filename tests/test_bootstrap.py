"""Bootstrap intervals of ∂_vH, against scipy's on the same columns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_uncertainty import both, made_up, of_both

from entropy_core.numerics import bootstrap
from entropy_core.numerics.bootstrap import intervals
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns, Functional
from entropy_core.numerics.uncertainty import entropy_derivative, standard_error

LEVEL = 0.9


def derivative_of_arrays(normalization: Normalization):
    def derivative(x, y, S, T, axis=-1):
        means = [column.mean(axis=axis) for column in (x, y, S, T)]
        return means[0] if normalization == "per_sequence" else (means[0] - means[2] / means[3] * means[1]) / means[3]

    return derivative


def sums_of(columns: dict[Functional, Columns]) -> list[torch.Tensor]:
    """x, y, S, T."""
    (S_N, x_N, _), (T_N, y_N, _) = columns[ENTROPY], columns[LENGTH]
    return [x_N, y_N, S_N, T_N]


def arrays(columns: dict[Functional, Columns]) -> list[np.ndarray]:
    return [column_N.numpy() for column_N in sums_of(columns)]


@both
@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_are_those_of_scipy(normalization: Normalization, method: str):
    """Two independent runs: an end is a quantile, with a Monte Carlo error of √(α(1 − α)/R)/density."""
    columns, resamples = made_up(60).columns, 20_000
    found = intervals(columns, normalization, LEVEL, resamples)
    options = {"confidence_level": LEVEL, "n_resamples": resamples, "batch": 1000, "method": method, "rng": 1}
    expected = stats.bootstrap(arrays(columns), derivative_of_arrays(normalization), paired=True, **options)
    tail = (1 - LEVEL) / 2
    of_quantile = math.sqrt(tail * (1 - tail) / resamples) / stats.norm.pdf(stats.norm.ppf(tail))
    of_median_bias = 2 * math.sqrt(0.25 / resamples) / stats.norm.pdf(0)  # which shifts both ends, twice
    error = 4 * math.sqrt(2) * math.hypot(of_quantile, of_median_bias) * float(expected.standard_error)
    ends = found[:2] if method == "percentile" else found[2:4]
    assert ends == pytest.approx(tuple(map(float, expected.confidence_interval)), abs=error)
    assert found.standard_error == pytest.approx(float(expected.standard_error), rel=4 / math.sqrt(resamples))


@both
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("N", [4, 15, 100])
def test_the_same_resamples_give_the_ends_of_scipy(normalization: Normalization, level: float, N: int):
    """No Monte Carlo error: scipy is handed the distribution. The data are skew, so that BCa has work to do."""
    data = made_up(N)
    columns = data._replace(x_N=data.x_N.exp()).columns
    found = intervals(columns, normalization, level, 999, seed=3)
    sums_N5 = torch.stack([*sums_of(columns), torch.ones(N).double()], dim=1)
    values_R = bootstrap._derivative(bootstrap._resampled_sums(sums_N5, 999, seed=3), normalization)
    known = SimpleNamespace(bootstrap_distribution=values_R.numpy())
    options = {"paired": True, "confidence_level": level, "n_resamples": 0, "bootstrap_result": known}
    for method, ends in (("percentile", found[:2]), ("BCa", found[2:4])):
        expected = stats.bootstrap(arrays(columns), derivative_of_arrays(normalization), method=method, **options)
        assert ends == pytest.approx(tuple(map(float, expected.confidence_interval)), rel=1e-9)
        assert found.standard_error == pytest.approx(float(expected.standard_error), rel=1e-12)
    assert found[2:4] != pytest.approx(found[:2], rel=1e-3)


@both
def test_the_standard_error_is_that_of_the_influences(normalization: Normalization):
    columns, resamples = made_up(500).columns, 4000
    expected = standard_error(entropy_derivative(columns, normalization).influence_N)
    found = intervals(columns, normalization, LEVEL, resamples).standard_error
    assert found == pytest.approx(expected, rel=4 / math.sqrt(2 * resamples) + 0.01)


@both
def test_whole_clusters_are_drawn(normalization: Normalization):
    data, clusters_N = made_up(600), torch.randint(0, 200, (600,)) * 7
    shock_N = torch.randn(200).double()[clusters_N // 7]
    columns = data._replace(x_N=data.x_N + 3 * shock_N).columns
    influence_N = entropy_derivative(columns, normalization).influence_N
    found = intervals(columns, normalization, LEVEL, 4000, clusters_N).standard_error
    expected = standard_error(influence_N, clusters_N)
    assert expected > 1.3 * standard_error(influence_N)
    assert found == pytest.approx(expected, rel=4 / math.sqrt(2 * 4000) + 0.02)
    alone = intervals(columns, normalization, LEVEL, 200)
    assert intervals(columns, normalization, LEVEL, 200, torch.arange(600)) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 30])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    columns = made_up(150).columns
    before = intervals(columns, "per_token", LEVEL, 333)
    monkeypatch.setattr(bootstrap, "CHUNK_COUNTS", chunk)
    assert intervals(columns, "per_token", LEVEL, 333) == pytest.approx(before, rel=1e-12)


def test_the_seed_decides_and_nothing_else():
    columns = made_up(50).columns
    torch.manual_seed(1)
    one = intervals(columns, "per_token", LEVEL, 300, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert intervals(columns, "per_token", LEVEL, 300, seed=5) == one
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a != b for a, b in zip(one, intervals(columns, "per_token", LEVEL, 300, seed=6), strict=True))


def test_fewer_than_two_units_have_no_interval():
    assert all(math.isnan(field) for field in intervals(made_up(1).columns, "per_token", LEVEL, 10))
    together_N = torch.zeros(9, dtype=torch.long)
    assert all(math.isnan(field) for field in intervals(made_up(9).columns, "per_sequence", LEVEL, 10, together_N))


@both
def test_equal_sequences_have_an_interval_of_no_width(normalization: Normalization):
    columns = of_both(*(torch.full((12,), c, dtype=torch.float64) for c in (0.3, 0.7, 0.1, 2.3, 5.0)))
    value = entropy_derivative(columns, normalization).value
    found = intervals(columns, normalization, LEVEL, 100)
    assert found[:4] == pytest.approx((value,) * 4, rel=1e-13)
    assert found.standard_error == pytest.approx(0.0, abs=1e-14)


def test_an_acceleration_beyond_the_pole_leads_to_the_outermost_resample():
    """One sequence that is everything: a = 1/6, the largest there is, and a quantile of 6."""
    x_N = torch.zeros(2000, dtype=torch.float64)
    x_N[0] = 1e6
    found = intervals(of_both(x_N, x_N, x_N, x_N, x_N), "per_sequence", 1 - 1e-9, 50)
    assert 0 <= found.bca_low <= found.bca_high == pytest.approx(found.percentile_high, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_resamples_that_are_all_on_one_side_have_an_interval(seed: int):
    found = intervals(made_up(20).columns, "per_token", LEVEL, 2, seed=seed)
    assert all(math.isfinite(field) for field in found)
    assert found.bca_low <= found.bca_high
