"""The verdicts of a row, each by its own rule, and the word for all of them."""

from typing import Any

import pytest
import torch

from entropy_core.numerics.uncertainty import Estimate
from entropy_core.numerics.verdicts import bounds, linearity, sign, verdict, weights_reliable

NAN = float("nan")
CLEAR: dict[str, Any] = {
    "eta": 1e-5,
    "weights_reliable": True,
    "above_rounding": True,
    "sign_this_update": "negative",
    "linearity": "linear",
}


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("resolved", {}),
        ("resolved", {"sign_this_update": "positive"}),
        ("resolved", {"linearity": "undecided"}),
        ("nonlinear", {"linearity": "nonlinear"}),
        ("noise-limited", {"sign_this_update": "unknown"}),
        ("noise-limited", {"sign_this_update": "unknown", "linearity": "nonlinear"}),  # noise outranks nonlinearity
        ("noise-limited", {"above_rounding": False, "linearity": "nonlinear"}),
        ("weights-unreliable", {"weights_reliable": False, "above_rounding": False}),
        ("reference", {"eta": 0.0, "weights_reliable": False}),
    ],
)
def test_words(word: str, changes: dict[str, Any]):
    assert verdict(**CLEAR | changes).word == word


def test_a_rule_says_what_is_known():
    assert "below 5%" in verdict(**CLEAR).rule
    assert "not shown to be below or above 5%" in verdict(**CLEAR | {"linearity": "undecided"}).rule
    assert "rounding" in verdict(**CLEAR | {"above_rounding": False}).rule
    assert "ESS/N < 0.5" in verdict(**CLEAR | {"weights_reliable": False}).rule


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.2, "positive"),
        (-0.2, -0.1, "negative"),
        (-0.1, 0.1, "unknown"),
        (0.0, 0.1, "unknown"),
        (-0.1, 0.0, "unknown"),
        (None, None, "unknown"),
    ],
)
def test_a_sign_is_that_of_the_whole_interval(low, high, expected):
    assert sign(low, high) == expected


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize(
    ("curvature", "error", "expected"),
    [
        (0.0, 0.02, "linear"),
        (0.0, 0.026, "undecided"),  # not significant is not linear
        (0.04, 0.001, "linear"),
        (0.04, 0.01, "undecided"),
        (0.06, 0.001, "nonlinear"),
        (0.06, 0.01, "undecided"),  # beyond 5 %, significantly not 0, and perhaps not beyond
        (-0.04, 0.001, "linear"),
        (-0.06, 0.001, "nonlinear"),
    ],
)
def test_linearity_is_shown_from_both_sides(curvature: float, error: float, expected: str, direction: float):
    """Against 5 % of a δH₁ of ±1, known exactly, with a quantile of 2."""
    zero_N = torch.zeros(3, dtype=torch.float64)
    above, below = bounds(Estimate(curvature, zero_N), Estimate(direction, zero_N))
    assert linearity(above.value, error, below.value, error, 2.0) == expected


def test_the_bounds_share_the_noise_of_the_prediction():
    """A curvature that is always 3 % of δH₁ is linear however noisy both are."""
    influence_N = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    above, below = bounds(Estimate(-0.03, 0.03 * influence_N), Estimate(-1.0, influence_N))
    assert above.value == pytest.approx(-0.08) and below.value == pytest.approx(0.02)
    torch.testing.assert_close(above.influence_N, (0.03 + 0.05) * influence_N)
    torch.testing.assert_close(below.influence_N, (0.03 - 0.05) * influence_N)


@pytest.mark.parametrize(
    ("ess_fraction", "k", "reliable"),
    [
        (0.5, 0.3, True),
        (0.499, 0.3, False),
        (0.499, None, False),  # whatever k says
        (0.8, 0.66, False),
        (0.8, 0.64, True),
        (0.8, None, True),
        (0.95, 0.66, True),  # a tail of weights that are all nearly 1
        (NAN, 0.3, False),
    ],
)
def test_weights(ess_fraction: float, k: float | None, reliable: bool):
    assert weights_reliable(ess_fraction, k, 0.65) is reliable
