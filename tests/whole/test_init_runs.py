"""`entropy-probe init` on runs of TRL's trainer: the file that it writes runs as it is, to the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from pipeline_fixtures import SHAPE, skip_figures
from trainer_fixtures import MAX_NEW_TOKENS, PROMPTS, REWARDS, STEPS, G, Own, train
from trainer_prompts import CHATS
from transformers import AutoModelForCausalLM

from entropy_core.config.read import load_config
from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer, make_demo_run
from entropy_core.files.checkpoint import RUN_HINT
from entropy_core.pipeline.settings import value_of
from flows.cli import main

FEW = "E_total_sequences: 16"
OF_STEPS = [f"checkpoint-{step + 1}" for step in range(STEPS)]
Expected = dict[str, Any]


def demo(run: Path) -> Expected:
    """The demo run, of a smaller policy."""
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 24, "warm_steps": 2, "max_new_tokens": 8}
    make_demo_run(run, DemoSettings(**small, steps=2, save_every=1, prompts_per_step=4, generations=2))
    text = (run / RUN_HINT).read_text()
    (run / RUN_HINT).write_text(text.replace("{dataset_name", f"{{{FEW}, dataset_name"))
    return {"batch_config.B_U": 4, "batch_config.G": 2, "generation.max_new_tokens": 8}


def lora(run: Path) -> Expected:
    """An adapter, whose base lies beside the run."""
    base = run.with_name("base")
    build_model(SHAPE).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(run, model, adapter, temperature=0.8, beta=0.1, logging_steps=1, own=Own())
    batch = f"{{{FEW}, dataset_name: arithmetic}}"
    (run / RUN_HINT).write_text(f"batch_config: {batch}\nupdate: {{reward: '{REWARDS}:low_digits'}}\n")
    return {"generation.temperature": 0.8, "update.kl_beta": 0.1}


def conversations(run: Path) -> Expected:
    """Prompts that are messages, with arguments for the chat template and two rewards."""
    train(run, build_model(SHAPE), own=CHATS, logging_steps=1, chat_template_kwargs={"hint": True})
    (run / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS.rows or ()))
    functions = [f"{REWARDS}:{name}" for name in CHATS.rewards]
    batch = f"{{{FEW}, dataset_name: prompts.jsonl}}"
    (run / RUN_HINT).write_text(f"batch_config: {batch}\nupdate: {{reward: {json.dumps(functions)}}}\n")
    return {"batch_config.chat_template_kwargs": {"hint": True}, "generation.max_new_tokens": MAX_NEW_TOKENS}


@pytest.mark.parametrize("make", [demo, lora, conversations])
def test_what_init_writes_runs_as_it_is(tmp_path, monkeypatch, capsys, make: Callable[[Path], Expected]):
    skip_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    expected = {"batch_config.B_U": PROMPTS, "batch_config.G": G} | make(tmp_path / "run")
    capsys.readouterr()
    assert main(["init", "run", "-o", "probe.yaml"]) == 0
    config = load_config("probe.yaml", must_exist=True)
    assert {key: value_of(config, key) for key in expected} == expected
    assert config.batch_config.E_total_sequences == 16  # of the run's own entropy-probe.yaml
    assert main(["sweep", "probe.yaml", "--direct"]) == 0, capsys.readouterr().err
    (report,) = Path("artifacts/runs").glob("*/report.md")
    text = report.read_text()
    for name in ["checkpoint-1", "checkpoint-2"] if make is demo else OF_STEPS:
        assert f"| {name} |" in text
    assert "**Warning:**" not in text.partition("\n\n")[2][:20]
