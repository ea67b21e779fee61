"""What dropout does to the step: measured, where the trainer had it on."""

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.losses.files import read_batch
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.vectors import global_norm, in_blocks
from entropy_core.pipeline.measure import DROPOUT_DRAWS
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of


def swept(folder: Path, **rates: float) -> Probe:
    """A sweep of a GPT-2 with these dropout rates."""
    make_gpt2(folder / "run" / "checkpoint-3", **rates)
    reward = folder / "reward.py"
    reward.write_text(
        "def low(completions, **_):\n    return [sum(c in '01234' for c in t) / 4 for t in completions]\n"
    )
    return probe(values(folder / "run", folder / "artifacts", update={"reward": f"{reward}:low"}))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Probe:
    """With rates of 0.1."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return swept(tmp_path_factory.mktemp("dropout"))


OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_nothing_is_measured_without_dropout(tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    done = swept(tmp_path, **OFF)
    assert not done.run.computed["dropout-u"] and done.checkpoints[0].warnings == ()


def test_the_difference_of_the_step_is_measured_and_said(done):
    (artifact,) = done.run.artifacts("dropout-u")
    rows = artifact.table("draws.parquet").to_pylist()
    assert len({row["relative_difference"] for row in rows}) == len(rows) == DROPOUT_DRAWS
    assert artifact.summary["relative_differences"] == [row["relative_difference"] for row in rows]
    assert all(0.01 < row["relative_difference"] < 2 for row in rows)
    (of_u,) = done.run.artifacts("first-order-u")
    for row, change in zip(rows, artifact.summary["changes"], strict=True):
        for normalization, product in of_u.summary["inner_product"].items():
            assert row[f"without_{normalization}"] == pytest.approx(product, rel=1e-9)  # v without dropout
        assert change == pytest.approx(row["inner_product_per_token"] / of_u.summary["inner_product"]["per_token"] - 1)
    page = (done.result.run_directory / "report.md").read_text()
    assert "dropout was on" in page.lower() and "With dropout on as in the trainer's step, over 4 draws" in page


def test_a_draw_is_the_step_with_masks_of_its_seed(done):
    """Against torch's own gradient of Σ c·ℓ through the whole model in training mode."""
    inputs, update = done.run.inputs("dropout-u"), done.run.artifacts("compute-update")[0]
    processor = processor_of(inputs["policy"], done.run.execution)
    model, parameters = processor.policy.model, processor.policy.named_parameters()
    shards = [read_sequences(shard) for shard in inputs["sequences"]]
    _, coefficients = read_batch(update, tokens_of(shards))
    assert not coefficients.entropy_K.any()
    c_N = coefficients.logprob_K.split([len(shard.response_tokens_K) for shard in shards])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)  # the third draw
        model.train()
        total = 0.0
        for shard, c_K in zip(shards, c_N, strict=True):
            for index_K, rows in processor.micro_batches(shard):
                logits = model(input_ids=rows.input_ids_BL).logits[rows.row_K, rows.position_K]
                logprobs_K = logits.log_softmax(-1).gather(-1, rows.tokens_K[:, None]).squeeze(-1)
                total = total + (c_K[index_K] * logprobs_K).sum()
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        model.eval()
    g = in_blocks(gradients)
    clip = clip_factor(global_norm(g), update.summary["max_grad_norm"])
    step = OptimizerStep(inputs["checkpoint"], done.run.execution, parameters, g, clip)
    v, without = step.part("direction"), in_blocks(update.vector("direction"))
    apart = global_norm({block: v[block] - without[block] for block in v}) / global_norm(without)
    (artifact,) = done.run.artifacts("dropout-u")
    assert artifact.summary["relative_differences"][2] == pytest.approx(apart, rel=1e-6)
