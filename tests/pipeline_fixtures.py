"""Tiny checkpoints with a real AdamW state, a reward to probe them with, and a runner that counts.

    make_run     two checkpoints of the demo's Llama with a width of 16, whose norms compute in float32 at any dtype
    make_gpt2    one of a GPT-2 with tied embeddings and dropout, in which float64 is float64 throughout

Responses end at random, so lengths and finish reasons differ.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer
from entropy_core.isolation.process import Isolation
from entropy_core.numerics.vectors import Block, in_blocks
from entropy_core.pipeline.preflight import CheckpointToProbe, preflight
from entropy_core.pipeline.runner import Inputs, Runner, direct_runner
from entropy_core.pipeline.statistics import SweepResult
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.spec import policy_of
from entropy_core.prompts.arithmetic import problems
from entropy_core.report import figures
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

SHAPE = DemoSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24)
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
NAMES = ("checkpoint-3", "checkpoint-5")

REWARD = '''"""A reward that an untrained policy gets different amounts of."""


def share_of_low_digits(completions, **_):
    return [sum(c in "01234" for c in text) / 4 for text in completions]
'''

BONUS = '''from entropy_core.numerics.losses import grpo


def mine(batch):
    """GRPO with an entropy bonus."""
    return grpo(batch) - 0.01 * batch.mean(batch.sequence_sum(batch.entropies_K) / batch.lengths_N)
'''
"""A loss of a user's own, in a file."""


def trainer_groups(model: torch.nn.Module, named: bool = False, decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """The Trainer's two groups, written out: everything but norms and biases decays."""

    def group(plain: bool, decay: float) -> dict[str, Any]:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        pairs = [(n, p) for n, p in trained if ("norm" in n or "ln_" in n or n.endswith("bias")) is plain]
        return {"params": pairs if named else [p for _, p in pairs], "weight_decay": decay}

    return [group(False, decay), group(True, 0.0)]


def save_checkpoint(directory: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> Path:
    """What a trainer leaves behind."""
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def train(
    model: Any, steps: int, groups: Any = None, optimizer: Any = None
) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """AdamW steps on worked solutions, with torch's own optimizer; yields after each of them."""
    tokenizer = build_tokenizer()
    optimizer = optimizer or torch.optim.AdamW(groups or trainer_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.99))
    examples = [tokenizer(row["prompt"] + row["solution"])["input_ids"] for row in problems("train", 8)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for ids in examples:
            (model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss / len(examples)).backward()
        optimizer.step()
        yield step, optimizer


def make_run(root: Path) -> Path:
    """A run directory with the checkpoints of `NAMES`."""
    model = build_model(SHAPE)
    for step, optimizer in train(model, 5):
        if f"checkpoint-{step}" in NAMES:
            save_checkpoint(root / f"checkpoint-{step}", model, optimizer, step)
    return root


def gathered(directory: Path) -> Path:
    """Put the state of a checkpoint into the files that FSDP gathers it in, which transformers cannot open."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model_fsdp.bin")
    (directory / "model.safetensors").unlink()
    (directory / "optimizer.pt").rename(directory / "optimizer.bin")
    return directory


def make_gpt2(directory: Path, **changes: Any) -> Path:
    """A checkpoint after three steps."""
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(build_tokenizer())}
    torch.manual_seed(0)
    tokens = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape | tokens | changes))
    *_, (step, optimizer) = train(model, 3)
    return save_checkpoint(directory, model, optimizer, step)


def write_reward(directory: Path, text: str = REWARD) -> str:
    """Write a reward file; returns how a configuration names the function in it."""
    path = directory / "reward.py"
    path.write_text(text)
    return f"{path}:share_of_low_digits"


def write_rollouts(path: Path, prompts: int = 4, responses: int = 4, **columns: Any) -> Path:
    """A file of rollouts that no policy drew: token ids and rewards; further columns have a value per response."""
    dice, tokenizer = random.Random(0), build_tokenizer()
    ends = [tokenizer.eos_token_id]
    rows = [
        {
            "prompt_ids": tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            "completion_ids": [*dice.choices(range(3, 13), k=dice.randrange(7)), *ends],
            "reward": dice.random(),
        }
        for row in problems("train", prompts)
        for _ in range(responses)
    ]
    path.write_text("".join(json.dumps(row | columns) + "\n" for row in rows))
    return path


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
        base[name] = base.get(name, {}) | section if isinstance(section, Mapping) else section
    return base


def skip_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which takes most of the time of a tiny sweep; no key depends on it."""
    monkeypatch.setattr(figures, "figures", lambda *_: {})
    monkeypatch.setattr(figures, "token_figure", lambda *_: None)
    monkeypatch.setattr(figures, "save_figure", lambda _, png, svg: svg.write_text("<svg/>"))


def call_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the user's functions in this process: one of its own has to load torch first."""

    def call(self: Isolation, function: Callable[..., bytes | Iterator[bytes]], *arguments: Any, **_: Any) -> bytes:
        answer = function(*arguments)
        return answer if isinstance(answer, bytes) else b"".join(answer)

    monkeypatch.setattr(Isolation, "call", call)


class Counting(Runner):
    """A runner that calls the stages directly and notes what it was asked for and what was not there yet."""

    def __init__(self, store: Store, execution: Any) -> None:
        super().__init__(self.note)
        self.store, self.execution = store, execution
        self.computed: Counter[str] = Counter()
        self.asked: list[tuple[str, Inputs, Artifact]] = []

    def note(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """The artifact, noted."""
        fresh = not (self.store.root / stage.name / self.store.key(stage, inputs) / "manifest.json").exists()
        artifact = direct_runner(self.store, self.execution)(stage, inputs, label)
        self.computed[stage.name] += fresh
        self.asked.append((stage.name, inputs, artifact))
        return artifact

    def artifacts(self, stage: str) -> list[Artifact]:
        """The artifacts of one stage, in order."""
        return [artifact for name, _, artifact in self.asked if name == stage]

    def inputs(self, stage: str) -> Inputs:
        """What a stage was first asked to compute from."""
        return next(inputs for name, inputs, _ in self.asked if name == stage)

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


def whole(vector: Mapping[Block, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vector that comes in blocks, as float64 tensors of the same shapes as others."""
    found = {name: torch.empty(tensor.shape, dtype=torch.float64) for name, tensor in like.items()}
    for block, values in vector.items():
        found[block.name].view(-1)[block.start : block.stop] = values
    return found


def parts_of(update: Artifact, run: Counting) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a step and its diagonals, computed anew from what the step left in the store."""
    (loaded,) = [
        artifact for artifact in run.artifacts("load-checkpoint") if artifact.to_dict() in update.manifest["upstream"]
    ]
    inputs = next(inputs for _, inputs, artifact in run.asked if artifact.stage == "compute-update")
    parameters = policy_of(inputs["policy"], run.execution).named_parameters()
    gradient = in_blocks(update.vector("gradient"))
    step = OptimizerStep(loaded, run.execution, parameters, gradient, update.summary["clip_factor"])
    parts = {name: step.part(name) for name in ("direction", "momentum", "gradient", "decay")}
    ones = in_blocks({name: torch.ones_like(parameter) for name, parameter in parameters.items()})
    diagonals = {"preconditioner": step.applied("preconditioned", ones), "jacobian": step.applied("pulled_back", ones)}
    return {name: whole(vector, parameters) for name, vector in (parts | diagonals).items()}


def probe(values: Mapping[str, Any], isolated: bool = False) -> Probe:
    """What the flow does: parse, check, sweep.

    Args:
        values: the configuration.
        isolated: whether the user's functions run in processes of their own, which take as long as a tiny sweep.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not isolated:
            call_here(patch)
        config = parse_config(values)
        checkpoints = preflight(config)
        store = Store(config.store_root)
        run = Counting(store, execution_for(config, checkpoints))
        return Probe(config, checkpoints, run, sweep(config, checkpoints, store, run))
