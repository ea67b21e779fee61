"""A rehearsal on the responses that TRL drew, against the weights that TRL saved after as many steps."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import SHAPE, call_here, skip_figures, values, write_reward
from trainer_fixtures import LORA, PROMPTS, Batch, G, Recorded, as_stored, train, weights
from transformers import AutoModelForCausalLM

from entropy_core.config.read import parse_config
from entropy_core.demo.run import build_model, build_tokenizer
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Store

pytest.importorskip("trl")

BEFORE, STEPS = 2, 4
SETTINGS = {"max_steps": BEFORE + STEPS, "lr_scheduler_type": "constant", "max_grad_norm": 0.3, "learning_rate": 5e-3}


class OnTheirs(Recorded):
    """A runner that takes every U from the trainer, step by step."""

    batches: list[Batch]

    @property
    def batch(self) -> Batch:  # type: ignore[override]
        """That of the next step."""
        return self.batches[min(len(self.artifacts("rehearsal-step")), len(self.batches) - 1)]


def rehearsed(home: Path, model: Any, peft_config: Any = None, **settings: Any) -> list[Artifact]:
    """Train, and rehearse the last steps from the checkpoint before them."""
    batches = train(home / "run", model, peft_config, **SETTINGS | settings)
    asked = values(
        home / "run",
        home / "artifacts",
        checkpoints=[str(home / "run" / f"checkpoint-{BEFORE}")],
        policy={"dtype": "float32"},
        update={"reward": write_reward(home)},
        importance={"etas": [0]},
        lab={"rehearse": {"steps": STEPS, "seeds": 1, "every": STEPS}},
        execution={"shard_size": PROMPTS * G},
    )
    del asked["generation"]["max_new_tokens"]
    asked["batch_config"] = {"E_total_sequences": 4}
    config = parse_config(asked)
    checkpoints = preflight(config)
    store = Store(config.store_root)
    run = OnTheirs(store, execution_for(config, checkpoints))
    run.batches = batches[BEFORE:]
    sweep(config, checkpoints, store, run)
    return run.artifacts("rehearsal-step")


def adapted(home: Path) -> tuple[Any, Any]:
    """A base model, which is also saved, and the adapter to train."""
    from peft import LoraConfig

    build_model(SHAPE).save_pretrained(home / "base")
    build_tokenizer().save_pretrained(home / "base")
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    return base, LoraConfig(task_type="CAUSAL_LM", **LORA)


@pytest.mark.parametrize("trained", ["all weights", "an adapter", "all weights, along a schedule"])
def test_the_weights_after_the_rehearsal_are_those_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
):
    skip_figures(monkeypatch)
    call_here(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        model, peft_config = adapted(tmp_path) if trained == "an adapter" else (build_model(SHAPE), None)
        schedule = "linear" if "schedule" in trained else "constant"
        steps = rehearsed(tmp_path, model, peft_config, lr_scheduler_type=schedule)
    assert [step.summary["steps"] for step in steps] == [1, 2, 3, 4]
    rates = [1, 0.75, 0.5, 0.25] if "schedule" in trained else [1, 1, 1, 1]
    assert [step.summary["rate"] for step in steps] == pytest.approx(rates, rel=1e-12)
    assert any(step.summary["clip_factor"] < 1 for step in steps) is (trained != "an adapter")
    before = weights(tmp_path / "run" / f"checkpoint-{BEFORE}")
    for number, step in enumerate(steps, start=1):
        after, lr = weights(tmp_path / "run" / f"checkpoint-{BEFORE + number}"), step.summary["learning_rate"]
        moved = {as_stored(name): lr * of.double() for name, of in step.vector("direction").items()}
        assert moved.keys() == after.keys()
        worst = max(float((before[name].double() + moved[name] - after[name]).abs().max()) for name in after)
        assert worst < 1e-6 * number < 1e-3 < max(float(of.abs().max()) for of in moved.values())
