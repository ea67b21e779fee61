"""A prediction and a measurement on different sequences: by hand, on rows of three numbers."""

from typing import Any

import pytest

from entropy_core.estimates.agreement import independent
from flows.results import HEADLINE, agreement_table


def row(eta_over_lr: float, delta_h: float, se: float, **changes: Any) -> dict[str, Any]:
    shared = {
        "checkpoint": "checkpoint-3",
        "normalization": "per_token",
        "estimator": "snis",
        "eta": eta_over_lr * 1e-4,
        "eta_over_lr": eta_over_lr,
        "delta_h": delta_h,
        "delta_h_se": se,
        "curvature": 0.01,
        "curvature_se": 0.002,
        "ess_fraction": 0.9,
        "mean_score_z": -1.5,
        "verdict": "resolved",
    }
    return dict.fromkeys(HEADLINE) | shared | changes


def replicate(seed: int, delta_h1: float, se: float, **changes: Any) -> dict[str, Any]:
    shared = {"checkpoint": "checkpoint-3", "normalization": "per_token"}
    return shared | {"seed": seed, "delta_h1": delta_h1, "se_given_u": se} | changes


FIRST = replicate(42, 99.0, 99.0)  # on the sequences that ΔH was measured on: no part of the comparison
ROWS = [
    row(0.0, 0.0, 0.0),
    row(1.0, -0.12, 0.03),
    row(2.0, 0.10, 0.06),
    row(-2.0, 0.10, 0.06, verdict="nonlinear"),
    row(1.0, 7.0, 1.0, estimator="per_decision"),
]


def test_the_difference_is_measured_in_both_standard_errors():
    found = list(independent(ROWS, [FIRST, replicate(43, -0.10, 0.04)]))
    assert [r["eta_over_lr"] for r in found] == [1.0, 2.0, -2.0]
    assert [r["predicted"] for r in found] == [-0.10, -0.20, 0.20]
    assert [r["predicted_se"] for r in found] == [0.04, 0.08, 0.08]
    assert [r["z"] for r in found] == pytest.approx([-0.02 / 0.05, 0.30 / 0.10, -0.10 / 0.10])
    assert [r["agrees"] for r in found] == [True, False, True]
    assert {r["seed"] for r in found} == {43}


def test_what_is_far_off_must_be_nonlinear_to_agree():
    far = [row(1.0, 1.0, 0.01), row(2.0, 1.0, 0.01, verdict="nonlinear")]
    found = list(independent(far, [FIRST, replicate(43, 0.0, 0.01)]))
    assert min(r["z"] for r in found) > 3
    assert [r["agrees"] for r in found] == [False, True]


def test_each_checkpoint_and_further_batch_is_compared_with_its_own():
    other = {"checkpoint": "checkpoint-6"}
    rows = [row(1.0, 0.1, 0.1), row(1.0, 0.2, 0.1, **other), row(1.0, 3.0, 1.0, normalization="per_sequence")]
    replicates = [
        FIRST,
        replicate(43, 0.1, 0.1),
        replicate(44, 0.2, 0.1),
        replicate(42, 9.0, 9.0, **other),
        replicate(43, 0.3, 0.1, **other),
        replicate(42, 9.0, 9.0, normalization="per_sequence"),
        replicate(43, 4.0, 1.0, normalization="per_sequence"),
    ]
    found = [(r["checkpoint"], r["seed"], r["delta_h"], r["predicted"]) for r in independent(rows, replicates)]
    assert found == [
        ("checkpoint-3", 43, 0.1, 0.1),
        ("checkpoint-3", 44, 0.1, 0.2),
        ("checkpoint-6", 43, 0.2, 0.3),
        ("checkpoint-3", 43, 3.0, 4.0),
    ]


def test_the_table_says_how_many_disagree():
    assert agreement_table(ROWS, []) == agreement_table(ROWS, [FIRST]) == ""
    text = agreement_table(ROWS, [FIRST, replicate(43, -0.10, 0.04)])
    head, *body, summary = text.splitlines()
    assert head.split()[:4] == ["checkpoint", "eta_over_lr", "seed", "predicted"]
    assert len(body) == 3 and body[0].split()[-1] == "resolved"
    assert "1 of 3 disagree; largest z of a mean score -1.50" in summary
    assert "all agree or are nonlinear" in agreement_table(ROWS[:2], [FIRST, replicate(43, -0.10, 0.04)])


def test_a_batch_without_noise_is_no_division_by_zero():
    rows = [row(1.0, 0.0, 0.0), row(2.0, -1.0, 0.0)]
    same, different = independent(rows, [FIRST, replicate(43, 0.0, 0.0)])
    assert same["z"] == 0.0 and same["agrees"]
    assert different["z"] == float("-inf") and not different["agrees"]
