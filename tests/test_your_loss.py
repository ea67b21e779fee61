"""A loss of the user, from the file to the report: the example of the documentation, against autograd on the model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, write_reward
from transformers import AutoModelForCausalLM

from entropy_core.errors import LossError
from entropy_core.sequences.files import read_sequences

PAGE = Path(__file__).parents[1] / "docs" / "bring-your-loss.md"
EXAMPLE = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
P, G = 4, 3


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    make_gpt2(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "my_loss.py").write_text(EXAMPLE["python"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(home: Path, **update: Any) -> Probe:
    asked = {"reward": write_reward(home)} | yaml.safe_load(EXAMPLE["yaml"])["update"] | update
    batch, execution = {"B_U": P, "G": G}, {"shard_size": P * G}
    return probe(values(home / "run", home / "artifacts", batch_config=batch, update=asked, execution=execution))


def test_the_gradient_is_that_of_the_loss_on_the_model(home: Path):
    """ℓ and h from the logits of the model as transformers loads it; the loss as it would be written for a trainer."""
    done = swept(home)
    (update,), (shard,) = done.run.artifacts("compute-update"), done.run.artifacts("sample-u-batch")
    model = AutoModelForCausalLM.from_pretrained(home / "run" / "checkpoint-3", dtype=torch.float64).eval()
    batch = read_sequences(shard)
    rewards_PG = torch.tensor(update.table("sequences.parquet")["reward"].to_pylist()).double().view(P, G)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages = (centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten().tolist()
    loss = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(advantages):
        prompt, response = batch.prompt(i), batch.response(i)
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1)
        own, entropies = logp.gather(-1, response[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
        loss = loss - (advantage * own.mean() + 0.01 * entropies.mean()) / (P * G)
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    found = update.vector("gradient")
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-10)
    assert update.tensors("loss.safetensors")["entropy_coefficient"].max() < 0
    assert "that of the `my_loss.py:with_bonus` loss (advantages divided" in report(done)
    for row in done.rows:
        assert row["attribution_closure"] < 1e-8 and row["gradient_check"] < 1e-8


def report(done: Probe) -> str:
    return (done.result.run_directory / "report.md").read_text()


def test_the_content_of_the_file_is_part_of_the_key(home: Path):
    swept(home)
    assert swept(home).run.was_computed == {}
    (home / "moved").mkdir()
    (home / "moved" / "my_loss.py").write_bytes((home / "my_loss.py").read_bytes())
    moved = swept(home, loss="moved/my_loss.py:with_bonus")
    assert "compute-update" not in moved.run.was_computed
    (home / "my_loss.py").write_text(EXAMPLE["python"].replace("0.01 *", "0.02 *"), encoding="utf-8")
    edited = swept(home).run.was_computed
    assert edited["compute-update"] == edited["first-order-u"] == 1
    assert not {"sample-u-batch", "reward-u-batch", "sample-e-batch", "entropy-gradient"} & edited.keys()


def test_a_loss_that_fails_is_refused_before_anything_is_computed(home: Path):
    (home / "my_loss.py").write_text("def with_bonus(batch):\n    return batch.logits.mean()\n", encoding="utf-8")
    with pytest.raises(LossError, match=r"AttributeError: .*logits.* at my_loss\.py:2"):
        swept(home)
    assert not (home / "artifacts").exists()


def test_the_page_names_what_a_loss_is_given():
    from entropy_core.numerics.loss_batch import LossBatch
    from entropy_core.numerics.losses import LOSSES

    page = PAGE.read_text(encoding="utf-8")
    for name in LossBatch.__dataclass_fields__.keys() - {"weights_N"}:
        assert f"`batch.{name}`" in page, name
    assert all(f"`{name}`" in page for name in LOSSES)
