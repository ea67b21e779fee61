"""What tokens did to the expected reward: shares that add up to δJ₁, and ∇J against forward mode along the step.

The policy has norms in float32, so that two ways to one number differ by 1e-7.
"""

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import Probe, make_run, probe, skip_figures, values, write_reward

from entropy_core.estimates.bought import bought
from entropy_core.report.price import of_tokens

INTERVENTIONS = ["positives_only", {"lr": 0.5}]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Probe:
    home = tmp_path_factory.mktemp("rewarded")
    run = make_run(home / "run")
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(
            values(
                run,
                home / "artifacts",
                checkpoints=[str(run / "checkpoint-3")],
                update={"reward": write_reward(home)},
                price=True,
                interventions=INTERVENTIONS,
                lab={"measure": "none"},
            )
        )


def test_the_shares_of_tokens_momentum_and_decay_are_the_change_of_the_reward(swept):
    """⟨∇J, v⟩ of the backward passes is ∂_vJ of the forward-mode pass, and the sum of the shares."""
    [shares], [loaded] = swept.run.artifacts("reward-shares-u"), swept.run.artifacts("load-checkpoint")
    table, summary, lr = shares.table("tokens.parquet"), shares.summary, loaded.summary["learning_rate"]
    halves = swept.run.artifacts("reward-gradient")[0].summary["halves"]
    n_0, n_1 = (half["sequences"] for half in halves)
    of_tokens_K = sum(
        n / (n_0 + n_1) * torch.tensor(table[f"share_{half}"].to_pylist(), dtype=torch.float64)
        for half, n in enumerate((n_0, n_1))
    )
    assert float(of_tokens_K.sum()) + summary["momentum"] + summary["decay"] == pytest.approx(
        summary["inner_product"], rel=1e-6
    )
    [price] = swept.run.artifacts("price")
    [row] = [row for row in price.table("price.parquet").to_pylist() if row["normalization"] == "per_token"]
    assert lr * summary["inner_product"] == pytest.approx(row["delta_j1"], rel=1e-6)


def test_predicted_interventions_say_what_they_do_to_the_reward(swept):
    [price] = swept.run.artifacts("price")
    delta_j1 = price.table("price.parquet").to_pylist()[0]["delta_j1"]
    rows = swept.run.artifacts("interventions")[0].table("interventions.parquet").to_pylist()
    predicted = {row["intervention"]: row for row in rows if row["level"] == "predict"}
    assert len(predicted) == 3
    for label, row in predicted.items():
        assert row["difference_j"] == pytest.approx(row["delta_j"] - delta_j1, abs=1e-6 * abs(delta_j1))
        expected = {"as it is": 1.0}.get(label, 0.5 if label.startswith("lr") else None)
        if expected:
            assert row["delta_j"] == pytest.approx(expected * delta_j1, rel=1e-6)
    assert all(row["delta_j"] is None for row in rows if row["level"] == "screen")


def test_the_report_says_what_buys_nothing(swept):
    report = (Path(swept.result.run_directory) / "report.md").read_text()
    assert "by tokens that buy no reward by one half of E" in report


def test_what_buys_nothing_is_selected_by_one_half_and_judged_by_the_other():
    entropy_K = torch.tensor([-4.0, -2.0, 1.0, -1.0], dtype=torch.float64)
    reward_HK = torch.tensor([[-1.0, 3.0, -5.0, -2.0], [2.0, -1.0, -5.0, -3.0]], dtype=torch.float64)
    found = bought(entropy_K, reward_HK)
    # by half 0: tokens 0 and 3, judged by half 1: 2 − 3; by half 1: tokens 1 and 3, judged by half 0: 3 − 2
    assert found == {"tokens": 0.5, "entropy": -4.0, "cost": -7.0, "reward": 0.0, "reward_of_all": -6.0}
    assert "57% of that" in of_tokens("checkpoint-3", found)
