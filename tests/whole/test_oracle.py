"""The scenarios of `make validate-long`: their rows are those of the product, and are counted right."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_direction
from oracle.__main__ import replicated
from oracle.counts import by_chance, counted, families, merged, share
from oracle.page import page
from oracle.product import from_tables, swept
from oracle.replicas import Replica, Truth
from oracle.scenarios import PLAIN, SCENARIOS, Ready
from pipeline_fixtures import call_here, skip_figures

SMALL = replace(PLAIN, prompts=8, prompts_u=8, of_e=64)
AS_SWEPT = {
    "clipped, DAPO, GPT-2": replace(SMALL, loss="dapo", clipped_to=0.5, temperature=0.7),
    "Gemma 2, second step": replace(SMALL, model="Gemma 2", steps=1, decay=0.1),
}
NOISE = {"noise_floor", "mean_logprob_difference", "largest_logprob_difference"}  # of rounding alone
NOT_IN_TABLES = {"attribution_closure", "gradient_check", "moved_fraction", "checkpoint", "step"}


@pytest.mark.parametrize("name", AS_SWEPT)
def test_rows_from_the_tables_are_those_of_a_sweep(name, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    call_here(monkeypatch)
    ready = Ready(AS_SWEPT[name])
    probe = swept(tmp_path, ready)
    rows = from_tables(ready, probe.run)
    assert len(rows) == len(probe.rows) == 3
    for row, of_sweep in zip(rows, probe.rows, strict=True):
        assert row.keys() == of_sweep.keys() - {"checkpoint", "step"}
        for column in row.keys() - NOISE - NOT_IN_TABLES:
            expected = of_sweep[column]
            if isinstance(expected, float):
                least = 1e-5 if column.endswith("_z") else 1e-12  # Gemma scales its embeddings in float32
                assert row[column] == pytest.approx(expected, rel=1e-5, abs=least), column
            else:
                assert row[column] == expected, column


def test_the_exact_values_are_those_of_the_enumeration():
    ready = Ready(SMALL)
    exact, laboratory = ready.laboratory.exact, ready.laboratory
    direction = random_direction(exact.policy)
    v_Q = torch.cat([part.flatten() for part in direction.values()])
    H = {eta: float(exact.exact_from(exact.scores_at(v_Q, eta)).of("per_token")) for eta in (-1e-3, 0.0, 1e-3)}
    first = (H[1e-3] - H[-1e-3]) / 2e-3
    second = (H[1e-3] + H[-1e-3] - 2 * H[0.0]) / 2e-6
    assert float(laboratory.dH_Q @ v_Q) == pytest.approx(first, rel=1e-4)
    assert float(v_Q @ laboratory.ddH_QQ @ v_Q) / 2 == pytest.approx(second, rel=1e-4)
    assert float(laboratory.law_R.sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_scenario_is_counted_and_written(tmp_path):
    counts = json.loads(json.dumps(replicated(SMALL, 2)))
    both = merged(counts, replicated(SMALL, 2, seed=2))
    assert both["replications"] == 4 and share(both, "delta_h1", "this")[1] == 4
    text = page({SMALL.label: both | {"date": "2026-01-01 00:00 UTC"}})
    assert f"| {SMALL.label} |" in text and " nan " not in text


def test_labels_differ():
    assert len({scenario.label for scenario in SCENARIOS}) == len(SCENARIOS) >= 40


# --- what is counted -------------------------------------------------------------------------------------------------


def replica(low: float, high: float, exact: float, **changes: object) -> Replica:
    """Of rows that all say the same."""
    row = {
        "interval_over_e": "valid",
        "interval_over_u": "no valid interval over U: 3 prompts of U have unequal rewards, and it takes 8",
        "weights_reliable": True,
        "verdict": "resolved",
        "linearity": "linear",
        "second_order": "unresolved",
        "above_rounding": True,
        "noise_floor": 0.0,
        "delta_h2": 0.0,
        "ess_fraction": 1.0,
        "nonlinearity_over_u": None,
    }
    for update in ("this", "mean", "next"):
        row |= {f"sign_{update}_update": "unknown", f"p_{update}_update": 0.5}
        for prefix in ("", "delta_h12_", "delta_h_"):
            ends = (low, high) if update == "this" else (None, None)
            row |= {f"{prefix}{update}_update_{end}": value for end, value in zip(("low", "high"), ends, strict=True)}
    rows = [row | changes for _ in range(3)]
    return Replica(rows, Truth([exact] * 3, [exact] * 3, [1.2 * exact] * 3))


def test_intervals_and_verdicts_are_counted():
    found = [
        replica(0.9, 1.1, 1.0, sign_this_update="negative"),
        replica(0.9, 1.3, 1.0, linearity="undecided", sign_this_update="positive"),
        replica(2.0, 3.0, 1.0, linearity="nonlinear", weights_reliable=False),
    ]
    counts = counted(found)
    assert [share(counts, name, "this") for name in ("delta_h1", "delta_h12", "delta_h")] == [(2, 3), (2, 3), (1, 2)]
    assert share(counts, "delta_h1", "mean") == (0, 0)
    at_lr = {kind: count for kind, count in counts["false"].items() if kind.endswith(" 1")}
    assert at_lr == {"sign of this 1": 1, "resolved 1": 1, "linear 1": 1}
    assert counts["claims"] == {
        "interval_over_e: valid": 3,
        "interval_over_u: fewer than 8 prompts with unequal rewards": 3,
    }


def test_a_share_is_judged_by_its_number():
    assert by_chance(185, 200) and not by_chance(180, 200) and by_chance(0, 0)


def test_families_have_the_rates_of_their_p_values():
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(4000, generator=generator).tolist()
    null, others = ({"p_values": {"this": p_values}} for p_values in (uniform, [1e-6] * 100))
    found = families(null, others, "this")
    assert found["p below 5 %"] == pytest.approx(0.05, abs=0.01)
    assert found["any false, without"] == pytest.approx(1 - 0.95**5, abs=0.03)
    assert found["any false, Holm"] == pytest.approx(1 - 0.99**5, abs=0.02)  # the others are rejected first
    assert found["false share, Benjamini-Hochberg"] < 0.05
    assert found["found, Holm"] == found["found, Benjamini-Hochberg"] == 1
