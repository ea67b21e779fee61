"""The steps that TRL takes on one rollout, against the phase that the probe follows from the checkpoint before it.

The trainer shuffles the rollout with torch's own generator, whose state it does not save; it is seeded here, so that
the probe can be told the same order. The probe reads everything else from the checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import SHAPE, skip_figures, values, write_reward
from trainer_fixtures import Batch, Recorded, train, weights

from entropy_core.config.read import parse_config
from entropy_core.demo.run import build_model
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.store.store import Store

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

SEED = 5
ONE = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "max_grad_norm": 0.3, "learning_rate": 5e-3}

CASES: dict[str, dict[str, Any]] = {
    "clipped": {"epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.05},
    "of sequences, token means, masked": {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.003,
        "off_policy_mask_threshold": 0.004,
    },
    "along a schedule": {  # whose top is among the steps
        "epsilon": 0.005,
        "epsilon_high": 0.01,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.6,
    },
}
ROLLOUTS = {  # parts of a rollout, parts that are accumulated, epochs
    "small": (4, 2, 2),
    "whole": (8, 1, 2),
}


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, and let the trainer shuffle by `SEED`."""
    skip_figures(monkeypatch)
    shuffled: Callable[[Any], Any] = grpo_trainer.shuffle_sequence_dict

    def seeded(rollout: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return shuffled(rollout)

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", seeded)


def followed(home: Path, settings: dict[str, Any], parts: int, accumulated: int, epochs: int) -> tuple[Any, float, int]:
    """Train for two rollouts; returns the steps that the probe takes on the second, the learning rate, and how many."""
    count = parts // accumulated * epochs
    own = {"steps_per_generation": parts, "gradient_accumulation_steps": accumulated, "num_iterations": epochs}
    run = home / "run"
    own |= {"max_steps": 2 * count, "save_steps": count}
    of_rollouts: list[Batch] = train(run, build_model(SHAPE), **ONE | own | settings)
    asked = values(
        run,
        home / "artifacts",
        checkpoints=[str(run / f"checkpoint-{count}")],
        policy={"dtype": "float32"},
        update={"reward": write_reward(home), "phase": {"follow": True, "shuffle_seed": SEED}},
        importance={"etas": [0]},
        execution={"shard_size": 64},
    )
    del asked["generation"]["max_new_tokens"]
    asked["batch_config"] = {"E_total_sequences": 4}
    config = parse_config(asked)
    checkpoints = preflight(config)
    store = Store(config.store_root)
    probe = Recorded(store, execution_for(config, checkpoints))
    probe.batch = of_rollouts[-1]
    assert len(probe.batch.prompts) == parts * ONE["per_device_train_batch_size"] == 4 * parts
    sweep(config, checkpoints, store, probe)
    (loaded,) = probe.artifacts("load-checkpoint")
    return probe.artifacts("phase-step"), loaded.summary["learning_rate"], count


def worst_and_moved(home: Path, steps: Sequence[Any], lr: float, count: int) -> tuple[float, float]:
    """The largest error of a weight after the last step, and the largest change of one along the phase."""
    before, after = (weights(home / "run" / f"checkpoint-{step}") for step in (count, 2 * count))
    direction = steps[-1].vector("direction")
    worst = max(float((before[name].double() + lr * direction[name] - after[name]).abs().max()) for name in before)
    return worst, max(float((after[name] - before[name]).abs().max()) for name in before)
