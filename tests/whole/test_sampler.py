"""A sweep whose E is drawn by another law: the same quantities, other samples, and a wrongly recorded law is caught."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, write_reward

from entropy_core.numerics.proposal import Proposal
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import SequenceProcessor
from entropy_core.store.columns import read_tokens

ESTIMATORS = ["per_decision", "weighted_per_decision", "snis", "path_integral"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sampler")
    make_gpt2(root / "run" / "checkpoint-3")
    write_reward(root)
    return root


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def swept(folder: Path, artifacts: str = "artifacts", **generation: Any) -> Probe:
    return probe(
        values(
            folder / "run",
            folder / artifacts,
            batch_config={"E_total_sequences": 120, "B_U": 8, "E_batch_seed": 7},
            generation={"max_new_tokens": 4} | generation,
            update={"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
            importance={"etas": [0, 0.01], "estimators": ESTIMATORS},
            execution={"shard_size": 60},
        )
    )


@pytest.fixture(scope="module")
def plain(folder) -> Probe:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return swept(folder)


BROAD = {"proposal_temperature": 2.0, "proposal_share": 0.5}


@pytest.mark.parametrize("generation", [BROAD, {"sampler": "bf16"}, BROAD | {"sampler": "bf16"}], ids=str)
def test_another_law_estimates_the_same(folder: Path, plain: Probe, generation: dict[str, Any]):
    found = swept(folder, **generation)
    assert found.run.computed["sample-e-batch"] == 2
    assert found.run.computed["sample-u-batch"] == found.run.computed["compute-update"] == 0  # the step is the same
    for row, expected in zip(found.rows, plain.rows, strict=True):
        assert (row["sampler"], row["interval_over_e"]) == ("proposal", "valid")
        assert max(abs(row[f"mean_{name}_z"]) for name in ("weight", "score", "surprisal")) < 4
        assert 0.5 < row["sampler_ess_fraction"] < 1 and row["sampler_ess_prefix"] > 60
        assert row["gradient_check"] < 1e-9 and row["attribution_closure"] < 1e-9
        for name, error in (("H", "H_se"), ("delta_h1", "se_given_u"), ("delta_h", "delta_h_se")):
            assert abs(row[name] - expected[name]) <= 4 * (row[error] ** 2 + expected[error] ** 2) ** 0.5
        if row["eta"] == 0:
            assert row["delta_h"] == row["curvature"] == 0.0 and row["weights_reliable"]
        else:
            assert row["H"] != expected["H"]
            assert abs(row["curvature"]) < 0.05 * abs(row["delta_h"])  # each estimator grows as its own derivative says
    report = (found.result.run_directory / "report.md").read_text()
    assert "## How E was drawn" in report and "no valid interval over E" not in report
    for shard in found.run.artifacts("score-e-batch"):
        log_q_K = read_tokens([shard], "proposal_logprobs")["proposal_logprobs"]
        assert bool((log_q_K < 0).all())


def test_the_policy_itself_records_nothing(plain: Probe):
    for row in plain.rows:
        assert (row["sampler"], row["sampler_ess_fraction"], row["mean_weight"]) == ("policy", 1.0, 1.0)
        assert row["mean_weight_z"] == row["largest_logprob_difference"] == 0.0 and row["sampler_pareto_k"] is None
    for shard in plain.run.artifacts("sample-e-batch"):
        assert read_sequences(shard).proposal_logprobs_K is None
    assert "How E was drawn" not in (plain.result.run_directory / "report.md").read_text()


def too_high(log_q_K: torch.Tensor, policy_K: torch.Tensor) -> torch.Tensor:
    return log_q_K + 0.02


def of_the_policy(log_q_K: torch.Tensor, policy_K: torch.Tensor) -> torch.Tensor:
    return policy_K


@pytest.mark.parametrize(
    ("mistake", "temperature", "speaks"),
    [(too_high, 4.0, "mean weight"), (of_the_policy, 0.25, "mean surprisal")],
    ids=["too high", "of the policy"],
)
def test_a_law_that_is_recorded_wrongly_is_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any, temperature: float, speaks: str
):
    right = SequenceProcessor._generate

    def wrong(self: SequenceProcessor, *arguments: Any):
        found = right(self, *arguments)
        if found.proposal_logprobs_K is None:
            return found
        policy_K = self.score(found)[0].logprobs_K
        return dataclasses.replace(found, proposal_logprobs_K=mistake(found.proposal_logprobs_K, policy_K))

    monkeypatch.setattr(SequenceProcessor, "_generate", wrong)
    found = swept(folder, mistake.__name__, proposal_temperature=temperature, proposal_share=1.0)
    for row in found.rows:
        assert row["interval_over_e"].startswith(
            "no valid interval over E: E was not drawn from the recorded distribution"
        )
        assert speaks in row["interval_over_e"]
        assert row["this_update_low"] is row["delta_h_next_update_high"] is row["delta_h12_this_update_low"] is None
        assert row["sign_this_update"] == "unknown" and row["linearity"] == "undecided"
        assert row["verdict"] in ("reference", "noise-limited", "weights-unreliable")
    report = (found.result.run_directory / "report.md").read_text()
    assert "> **Warning:** checkpoint-3: no valid interval over E" in report


def test_the_weights_of_a_mixture_are_bounded():
    law, offsets_N1 = Proposal(3.0, 0.25), torch.tensor([0, 400])
    policy_K, broad_K = torch.full((400,), -0.1).double(), torch.full((400,), -3.0).double()
    log_q_K = law.logprobs(policy_K, broad_K, offsets_N1)
    assert float((policy_K - log_q_K).sum().exp()) == pytest.approx(1 / 0.75, rel=1e-12)
