"""Tiny checkpoints with a real AdamW state, a pool and a reward to probe them with, and a runner that counts.

The policy is the demo run's with a width of 16: its responses end at random, so lengths and finish reasons differ.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from entropy_core.arithmetic import problems
from entropy_core.artifact import Artifact
from entropy_core.config import ProbeConfig, parse_config
from entropy_core.demo import DemoSettings, build_model, build_tokenizer
from entropy_core.manifest import MANIFEST
from entropy_core.stages.pipeline import Inputs, SweepResult, direct_runner, execution_for, sweep
from entropy_core.stages.preflight import CheckpointToProbe, preflight
from entropy_core.store import Stage, Store

SHAPE = DemoSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24)
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
NAMES = ("checkpoint-3", "checkpoint-5")

REWARD = '''"""A reward that an untrained policy gets different amounts of."""


def share_of_low_digits(completions, **_):
    return [sum(c in "01234" for c in text) / 4 for text in completions]
'''


def trainer_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The Trainer's two groups: everything but the norms decays."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]


def save_checkpoint(directory: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> Path:
    """What a trainer leaves behind."""
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def make_run(root: Path, learning_rate: float = LEARNING_RATE) -> Path:
    """A run directory with the checkpoints of `NAMES`: AdamW steps on worked solutions, with torch's own optimizer."""
    model, tokenizer = build_model(SHAPE), build_tokenizer()
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=learning_rate, betas=(0.9, 0.99))
    examples = [tokenizer(row["prompt"] + row["solution"])["input_ids"] for row in problems("train", 8)]
    for step in range(1, 6):
        optimizer.zero_grad()
        for ids in examples:
            (model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss / len(examples)).backward()
        optimizer.step()
        if f"checkpoint-{step}" in NAMES:
            save_checkpoint(root / f"checkpoint-{step}", model, optimizer, step)
    return root


def write_reward(directory: Path, text: str = REWARD) -> str:
    """Write a reward file; returns how a configuration names the function in it."""
    path = directory / "reward.py"
    path.write_text(text)
    return f"{path}:share_of_low_digits"


def values(run: Path, artifacts: Path, **sections: Mapping[str, Any] | Any) -> dict[str, Any]:
    """A small configuration as YAML would give it; a section that is given is laid over the default one."""
    base: dict[str, Any] = {
        "name": "tiny",
        "checkpoints": [str(run / "checkpoint-*")],
        "policy": {"dtype": "float64"},
        "batch_config": {"E_total_sequences": 16, "B_U": 4, "G": 4},
        "generation": {"max_new_tokens": 8, "gen_batch_size": 16, "tf_batch_size": 8},
        "update": {"reward": "arithmetic"},
        "importance": {"etas": [0, 1]},
        "variance": {},
        "execution": {"shard_size": 8, "artifacts": str(artifacts), "device": "cpu"},
    }
    for name, section in sections.items():
        base[name] = base[name] | section if isinstance(section, Mapping) else section
    return base


@dataclass
class Counting:
    """A runner that calls the stages directly and notes what it was asked for and what was not there yet."""

    store: Store
    execution: Any
    computed: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, Inputs, Artifact]] = field(default_factory=list)

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        manifest = self.store.root / stage.name / self.store.key(stage, inputs) / MANIFEST
        fresh = not manifest.exists()
        artifact = direct_runner(self.store, self.execution)(stage, inputs, label)
        self.computed[stage.name] += fresh
        self.asked.append((stage.name, inputs, artifact))
        return artifact

    def artifacts(self, stage: str, checkpoint: int = 0) -> list[Artifact]:
        """The artifacts of one stage for one checkpoint, in order."""
        found = [artifact for name, _, artifact in self.asked if name == stage]
        size = len(found) // len(NAMES)
        return found[checkpoint * size : (checkpoint + 1) * size]

    @property
    def was_computed(self) -> dict[str, int]:
        """How often each stage was computed, the others left out."""
        return {name: count for name, count in self.computed.items() if count}


@dataclass
class Probe:
    """A sweep that was made, and how."""

    config: ProbeConfig
    checkpoints: list[CheckpointToProbe]
    run: Counting
    result: SweepResult

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of results.parquet."""
        return self.result.report.table("results.parquet").to_pylist()


def probe(values: Mapping[str, Any]) -> Probe:
    """What the flow does: parse, check, sweep."""
    config = parse_config(values)
    checkpoints = preflight(config)
    store = Store(config.store_root)
    run = Counting(store, execution_for(config, checkpoints))
    return Probe(config, checkpoints, run, sweep(config, checkpoints, store, run))
