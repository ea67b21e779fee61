"""A tiny run of TRL's trainer, swept rightly and wrongly: the wrong ones are called out where people look first."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pipeline_fixtures import SHAPE, Probe, probe, skip_figures, values
from transformers import AutoTokenizer

from entropy_core.demo.run import build_model, build_tokenizer
from entropy_core.demo.training_run import grpo, quiet
from entropy_core.estimates.tables import AGREEMENT
from entropy_core.prompts.arithmetic import problems
from entropy_core.report.agreement import disagreements
from flows.results import print_results

pytest.importorskip("trl")

PROMPTS, G, STEPS, LENGTH = 16, 4, 12, 8
QUANTITIES = {"entropy", "mean_reward", "equal_reward_fraction", "mean_length", "truncated_fraction", "gradient_norm"}
REWARDS = """
def low(completions, **_):
    return [sum(c in "01234" for c in text) / 8 for text in completions]


def high(completions, **_):
    return [sum(c in "56789+= " for c in text) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of a policy that is surer than an untrained one, with a checkpoint in its middle and one at its end."""
    folder = tmp_path_factory.mktemp("looks_like")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "others.jsonl").write_text("".join(json.dumps({"prompt": f"{i}" * 3}) + "\n" for i in range(10, 42)))
    rules: dict[str, Any] = {}
    exec(REWARDS, rules)
    model = build_model(SHAPE)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    with quiet(threads=1), torch.random.fork_rng(devices=[]):
        grpo(
            model,
            build_tokenizer(),
            rules["low"],
            [{"prompt": row["prompt"]} for row in problems("train", 256)],
            folder / "run",
            num_generations=G,
            per_device_train_batch_size=PROMPTS * G,
            max_completion_length=LENGTH,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            learning_rate=1e-4,
            seed=1,
        )
    return folder


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def swept(home: Path, **sections: Any) -> Probe:
    asked = values(
        home / "run",
        home / "artifacts",
        policy={"dtype": "float32"},
        update={"reward": f"{home / 'rewards.py'}:low"},
        batch_config={"E_total_sequences": 256, "B_U": PROMPTS, "G": G},
        importance={"etas": [0]},
        generation={"gen_batch_size": 256, "tf_batch_size": 256},
        execution={"shard_size": 256},
    )
    del asked["generation"]["max_new_tokens"]
    for name, section in sections.items():
        asked[name] |= section
    return probe(asked)


def said(done: Probe, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str, str]:
    """Sentences about the run; the top of the report; the top of what the terminal shows."""
    folder = done.result.run_directory
    capsys.readouterr()
    print_results(folder)
    shown = capsys.readouterr().out.strip()
    page = (folder / "report.md").read_text(encoding="utf-8")
    rows = pq.read_table(folder / "agreement.parquet").to_pylist()
    return disagreements(rows), page.partition("\n\n")[2], shown


def test_a_right_sweep_looks_like_its_run(home, capsys):
    done = swept(home)
    sentences, top, shown = said(done, capsys)
    assert sentences == [] and not top.startswith("> **Warning:**") and not shown.startswith("WARNING")
    table = pq.read_table(done.result.run_directory / "agreement.parquet")
    assert table.schema.equals(AGREEMENT)
    rows = table.to_pylist()
    assert {(row["checkpoint"], row["step"]) for row in rows} == {("checkpoint-6", 6), ("checkpoint-12", 12)}
    assert {row["quantity"] for row in rows} == QUANTITIES | {"learning_rate"}
    assert {row["verdict"] for row in rows} == {"agrees"}
    for row in rows:
        if row["quantity"] != "learning_rate":
            assert row["z"] == pytest.approx((row["probe"] - row["trainer"]) / row["standard_error"])
    section = done.result.report.path("report.md").read_text(encoding="utf-8").partition("## Does this look like")[2]
    assert re.search(r"\| checkpoint-6 \| entropy per token \| agrees \|", section)


@pytest.mark.parametrize(
    ("section", "key", "value", "quantity", "advice"),
    [
        ("generation", "temperature", 1.6, "Entropy per token", "check generation.temperature (1 would fit, too)"),
        ("update", "reward", "rewards.py:high", "Mean reward", "check update.reward"),
        ("batch_config", "dataset_name", "others.jsonl", "Mean reward", "and the prompts"),
    ],
    ids=["temperature", "reward", "prompts"],
)
def test_a_wrong_sweep_is_called_out_first(home, capsys, section, key, value, quantity, advice):
    value = f"{home}/{value}" if isinstance(value, str) else value
    (sentence,), top, shown = said(swept(home, **{section: {key: value}}), capsys)
    assert top.startswith(f"> **Warning:** {sentence}\n") and shown.startswith(f"WARNING: {sentence}\n")
    assert sentence.startswith("This does not look like the trainer's run.")
    assert f"{quantity}: the trainer logged" in sentence and advice in sentence


def test_a_template_that_the_trainer_did_not_use_is_called_out_first(home, capsys, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    for checkpoint in run.glob("checkpoint-*"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.chat_template = "{{ '>;' * messages[0]['content'] | length }}"
        tokenizer.save_pretrained(checkpoint)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (sentence,), top, shown = said(swept(tmp_path, batch_config={"apply_chat_template": True}), capsys)
    assert top.startswith(f"> **Warning:** {sentence}\n") and shown.startswith(f"WARNING: {sentence}\n")
    assert "This does not look like the trainer's run." in sentence and "the chat template" in sentence
