"""Which word a row gets, and that the rule it names is the one that gave it."""

from typing import Any

import pytest

from entropy_core.numerics.verdicts import verdict

# a clear case; each test makes one thing worse
CLEAR: dict[str, Any] = {
    "eta": 1e-5,
    "delta_h1": -0.010,
    "delta_h": -0.011,
    "delta_h_se": 0.002,
    "curvature": -0.00045,
    "curvature_se": 0.00005,
    "ess_fraction": 0.8,
    "pareto_k": 0.3,
    "pareto_k_threshold": 0.65,
    "noise_floor": 1e-6,
    "quantile": 1.96,
}
NAN = float("nan")


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("resolved", {}),
        ("resolved", {"delta_h": 0.011}),  # the sign of the change does not matter
        ("reference", {"eta": 0.0}),
        ("reference", {"eta": 0.0, "ess_fraction": NAN}),
        ("weights-unreliable", {"ess_fraction": 0.099}),
        ("resolved", {"ess_fraction": 0.1}),
        ("weights-unreliable", {"ess_fraction": NAN}),
        ("weights-unreliable", {"delta_h": NAN}),
        ("weights-unreliable", {"pareto_k": 0.66}),
        ("resolved", {"pareto_k": 0.64}),
        ("resolved", {"pareto_k": 0.66, "pareto_k_threshold": 0.7}),
        ("resolved", {"pareto_k": 0.66, "ess_fraction": 0.95}),  # a tail of weights that are all nearly 1
        ("resolved", {"pareto_k": None}),
        ("reference", {"eta": 0.0, "pareto_k": 5.0}),
        ("noise-limited", {"delta_h": 0.0039}),
        ("resolved", {"delta_h": 0.0040}),
        ("noise-limited", {"delta_h": 0.0040, "noise_floor": 1e-3}),
        ("noise-limited", {"delta_h": -0.0039}),
        ("nonlinear", {"curvature": 0.00055}),
        ("nonlinear", {"curvature": -0.00055}),
        ("resolved", {"curvature": 0.00055, "curvature_se": 0.0003}),  # material, but it may be noise
        ("resolved", {"curvature": 0.00055, "noise_floor": 1e-3, "delta_h": 0.02}),
        ("noise-limited", {"curvature": 0.00055, "curvature_se": 0.0003, "delta_h_se": 0.006}),
    ],
)
def test_words(word: str, changes: dict[str, float]):
    assert verdict(**CLEAR | changes).word == word


def test_the_first_rule_that_applies_wins():
    worst = CLEAR | {"ess_fraction": 0.01, "curvature": 1.0, "delta_h": 0.0}
    assert verdict(**worst).word == "weights-unreliable"
    assert verdict(**worst | {"ess_fraction": 0.5}).word == "nonlinear"
    assert verdict(**worst | {"ess_fraction": 0.5, "curvature": 0.0}).word == "noise-limited"


def test_a_rule_names_its_numbers():
    assert verdict(**CLEAR | {"ess_fraction": 0.01}).rule == "ESS/N < 0.1"
    assert "Pareto k > 0.65" in verdict(**CLEAR | {"pareto_k": 0.7}).rule
    assert "1.64 SE" in verdict(**CLEAR | {"quantile": 1.6449, "delta_h": 0.0}).rule
    assert "5%" in verdict(**CLEAR | {"curvature": 0.00055}).rule
