"""What a sweep does when it is asked for more: paths, central differences, replicates, pairs of steps, predictors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, write_reward
from scipy import stats

from entropy_core.errors import CheckpointError, ConfigError, NonFiniteError
from entropy_core.numerics import ragged
from entropy_core.policy.spec import policy_of
from entropy_core.sequences.files import read_sequences
from entropy_core.stages import calibrate
from entropy_core.store.columns import read_tokens

SEED = 42


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("options")
    make_gpt2(root / "run" / "checkpoint-3")
    write_reward(root)
    return root


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def asked(folder: Path, **sections: Any) -> dict[str, Any]:
    own = {
        "batch_config": {"E_total_sequences": 24, "B_U": 8, "E_batch_seed": SEED},
        "update": {"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
        "importance": {
            "etas": [0, -0.1, 0.003, 0.03, 0.1],
            "estimators": ["per_decision", "weighted_per_decision", "snis", "path_integral"],
        },
    }
    for name, section in sections.items():
        own[name] = own.get(name, {}) | section
    return values(folder / "run", folder / "artifacts", **own)


@pytest.fixture(scope="module")
def plain(folder) -> Probe:
    """Of a policy in which float64 is float64."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(asked(folder))


def rows_of(found: Probe, estimator: str = "per_decision") -> dict[tuple[str, float], dict[str, Any]]:
    """By normalisation and multiple of the learning rate."""
    rows = [row for row in found.rows if row["estimator"] == estimator]
    return {(row["normalization"], round(row["eta_over_lr"], 6)): row for row in rows}


def table(found: Probe, name: str) -> list[dict[str, Any]]:
    return found.result.report.table(f"{name}.parquet").to_pylist()


# --- path integral ---------------------------------------------------------------------------------------------------


def test_the_path_integral_is_the_per_decision_change(plain):
    differences, integrals = rows_of(plain), rows_of(plain, "path_integral")
    for place, row in differences.items():
        other = integrals[place]
        for column in ("delta_h", "delta_h_se", "curvature", "delta_h1"):
            assert other[column] == pytest.approx(row[column], rel=1e-4, abs=1e-13)
        assert other["noise_floor"] == 0.0
        assert other["verdict"] == row["verdict"] or abs(row["delta_h"]) < 10 * row["noise_floor"]


def test_a_sweep_by_path_alone_makes_no_difference_of_passes(folder):
    found = probe(asked(folder, importance={"estimators": ["path_integral"], "etas": [0, 0.1]}))
    assert "importance" not in {name for name, _, _ in found.run.asked}
    assert found.run.was_computed == {"variance": 1, "report": 1}  # the paths are those of the sweep before


# --- central difference ----------------------------------------------------------------------------------------------


def test_central_differences_give_the_same_and_say_how_far_off_they_are(folder, plain):
    found = probe(asked(folder, policy={"dtype": "float64", "derivative": "central_difference"}))
    assert found.run.was_computed == {
        **{"calibrate": 1, "first-order-e": 3, "variance": 1, "report": 1},
    }
    for place, row in rows_of(found).items():
        exact = rows_of(plain)[place]
        assert exact["derivative_check"] is None
        assert 0 < row["derivative_check"] < 1e-3
        assert row["delta_h1"] == pytest.approx(exact["delta_h1"], rel=1e-3)
        assert row["gradient_check"] < 1e-3
    calibration = found.run.artifacts("calibrate")[0].summary
    derivatives = read_tokens(plain.run.artifacts("first-order-e"), "dlogprobs")
    change = calibration["half_width"] * float(derivatives["dlogprobs"].square().mean().sqrt())
    assert change == pytest.approx(min(calibrate.RMS_CHANGES), rel=1e-6)  # all of this E is compared on


def test_a_central_difference_that_is_off_is_refused(folder, monkeypatch):
    monkeypatch.setattr(calibrate, "RMS_CHANGES", (30.0, 100.0))
    batch = {"E_batch_seed": SEED + 7}
    with pytest.raises(NonFiniteError, match=r"misses forward mode by \d+%.*set policy.derivative: forward_mode"):
        probe(asked(folder, policy={"derivative": "central_difference"}, batch_config=batch))


# --- replicates ------------------------------------------------------------------------------------------------------


def test_replicates_are_the_batches_of_further_seeds(folder, plain):
    found = probe(asked(folder, batch_config={"E_replicates": 3}))
    assert found.run.was_computed == {
        **{"sample-e-batch": 6, "score-e-batch": 6, "first-order-e": 6, "variance": 1, "report": 1},
    }
    rows = [row for row in table(found, "replicates") if row["normalization"] == "per_token"]
    assert [row["seed"] for row in rows] == [SEED, SEED + 1, SEED + 2]
    for row in rows[1:]:
        alone = rows_of(probe(asked(folder, batch_config={"E_batch_seed": row["seed"]})))["per_token", 0.1]
        assert row["delta_h1"] == pytest.approx(10 * alone["delta_h1"], rel=1e-12)
        assert row["se_given_u"] == pytest.approx(10 * alone["se_given_u"], rel=1e-12)
    assert rows[0]["delta_h1"] == pytest.approx(10 * rows_of(plain)["per_token", 0.1]["delta_h1"], rel=1e-12)
    values_R, errors_R = ([row[name] for row in rows] for name in ("delta_h1", "se_given_u"))
    assert rows[0]["mean"] == pytest.approx(sum(values_R) / 3)
    assert rows[0]["mean_se"] == pytest.approx(stats.sem(values_R))
    spread = sum(((x - rows[0]["mean"]) / e) ** 2 for x, e in zip(values_R, errors_R, strict=True))
    assert rows[0]["p_value"] == pytest.approx(float(stats.chi2.sf(spread, 2)))
    (other,) = (
        row
        for row in table(found, "predictors")
        if (row["predictor"], row["normalization"]) == ("delta_h1_other_e", "per_token")
        and round(row["eta_over_lr"], 6) == 0.1
    )
    assert other["predicted"] == pytest.approx(0.1 * sum(values_R[1:]) / 2, rel=1e-12)
    page = found.result.report.path("report.md").read_text(encoding="utf-8")
    assert "## Accuracy of δH₁" in page and "| checkpoint-3 | 3 |" in page
    assert table(plain, "replicates") == []


# --- linearity -------------------------------------------------------------------------------------------------------


def test_the_intercept_is_the_derivative(plain):
    fits = table(plain, "linearity")
    assert len(fits) == 2 * 4
    for fit in fits:
        row = rows_of(plain, fit["estimator"])[fit["normalization"], 0.1]
        assert fit["etas"] == 4
        if fit["estimator"] in ("per_decision", "path_integral"):
            assert fit["derivative"] * row["eta"] == pytest.approx(row["delta_h1"], rel=1e-12)
        assert abs(fit["difference"]) <= 1e-3 * abs(fit["derivative"])
        assert fit["intercept"] - fit["derivative"] == pytest.approx(fit["difference"], abs=1e-9)
        assert fit["curvature"] * row["eta"] ** 2 == pytest.approx(row["curvature"], rel=0.2)


def test_pairs_of_opposite_steps(plain):
    pairs = table(plain, "eta_pairs")
    assert [(pair["normalization"], pair["estimator"]) for pair in pairs] == [
        (normalization, estimator)
        for normalization in ("per_token", "per_sequence")
        for estimator in ("per_decision", "weighted_per_decision", "snis", "path_integral")
    ]
    for pair in pairs:
        rows = rows_of(plain, pair["estimator"])
        forward, back = (rows[pair["normalization"], sign]["delta_h"] for sign in (0.1, -0.1))
        assert pair["eta_over_lr"] == pytest.approx(0.1)
        assert pair["odd"] == pytest.approx((forward - back) / 2, rel=1e-9)
        assert pair["even"] == pytest.approx((forward + back) / 2, rel=1e-9, abs=1e-15)
        assert abs(pair["odd_remainder"]) < 0.2 * abs(pair["even"])  # third order against second
    assert "| checkpoint-3 | path_integral | 0.1 |" in plain.result.report.path("report.md").read_text(encoding="utf-8")


# --- predictors ------------------------------------------------------------------------------------------------------


def test_predictors_are_computed_on_the_tokens_of_u(plain):
    shards = [read_sequences(shard) for shard in plain.run.artifacts("sample-u-batch")]
    lengths_N = torch.cat([ragged.lengths(shard.response_offsets_N1) for shard in shards])
    columns = read_tokens(plain.run.artifacts("score-u-batch"), "logprobs", "entropies")
    update = plain.run.artifacts("compute-update")[0].table("sequences.parquet")
    advantages_K = torch.repeat_interleave(torch.tensor(update["advantage"].to_pylist()), lengths_N).double()
    logp_K = columns["logprobs"]
    cov = float(((logp_K - logp_K.mean()) * advantages_K).mean())
    rows = table(plain, "predictors")
    at_lr = {r["predictor"]: r for r in rows if r["normalization"] == "per_token" and round(r["eta_over_lr"], 6) == 0.1}
    assert set(at_lr) == {"delta_h1", "delta_h12", "token_covariance", "weighted_token_covariance", "discriminator"}
    eta = at_lr["delta_h1"]["eta"]
    assert at_lr["token_covariance"]["predicted"] == pytest.approx(-eta * cov, rel=1e-6)
    measured = rows_of(plain)["per_token", 0.1]
    assert {row["delta_h"] for row in at_lr.values()} == {measured["delta_h"]}
    for name in ("delta_h1", "delta_h12"):
        assert at_lr[name]["predicted"] == measured[name]
    assert len(rows) == 2 * 4 * 5
    # E_π[S*] of every step, from the model's own logits
    model = policy_of(plain.run.inputs("score-u-batch")["policy"], plain.run.execution).model
    prompt, response = shards[0].prompt(0), shards[0].response(0)
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    expected_T = (logp.exp() ** 2 * (entropy + logp)).sum(-1)
    found = plain.run.artifacts("discriminate-u")[0].tensors("tokens.safetensors")["expected"]
    torch.testing.assert_close(found[: len(response)], expected_T.detach(), rtol=1e-10, atol=1e-12)


# --- baselines and intervals -----------------------------------------------------------------------------------------


def test_the_ridge_baseline_changes_the_noise_only(folder, plain):
    found = probe(asked(folder, variance={"baseline": "ridge"}))
    assert found.run.was_computed == {"variance": 1, "report": 1}
    for place, row in rows_of(found).items():
        before = rows_of(plain)[place]
        assert abs(row["delta_h1"] - before["delta_h1"]) <= 4 * before["se_given_u"]
        assert (row["delta_h1"] != before["delta_h1"]) == bool(row["eta"])
        assert row["gradient_check"] == before["gradient_check"]


# --- the reference of a KL term ---------------------------------------------------------------------------------------


def test_a_kl_term_needs_a_reference(folder):
    with pytest.raises(ConfigError, match=r"kl_beta is set, and checkpoint-3 is no adapter.*set update\.reference"):
        probe(asked(folder, update={"kl_beta": 0.1}))
    with pytest.raises(ConfigError, match="a reference policy has no part in a loss without a KL term"):
        probe(asked(folder, update={"reference": str(folder)}))


def test_a_reference_of_another_vocabulary_is_refused(folder, tmp_path):
    make_gpt2(tmp_path / "wider", vocab_size=50)
    with pytest.raises(CheckpointError, match="has 50 tokens, and checkpoint-3 has"):
        probe(asked(folder, update={"kl_beta": 0.1, "reference": str(tmp_path / "wider")}))
    with pytest.raises(CheckpointError, match="nowhere"):
        probe(asked(folder, update={"kl_beta": 0.1, "reference": str(tmp_path / "nowhere")}))
