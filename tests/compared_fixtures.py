"""Sweeps of two training runs in one store, and a rerun of the first with another baseline."""

from typing import NamedTuple

import pytest
import torch
from pipeline_fixtures import (
    LEARNING_RATE,
    NAMES,
    SHAPE,
    Counting,
    build_model,
    make_run,
    probe,
    save_checkpoint,
    skip_figures,
    train,
    trainer_groups,
    write_reward,
)
from swept_fixtures import config_of

from entropy_core.config.schema import VarianceRequest
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline.statistics import SweepResult
from entropy_core.store.store import Store

BATCH = {"E_total_sequences": 32, "B_U": 16, "G": 4}


class Compared(NamedTuple):
    """A store that is read only, and what is in it: a sweep, its rerun, the sweep of another training run, one with
    other batches, and one of both training runs."""

    store: Store
    first: SweepResult
    ridge: SweepResult
    second: SweepResult
    other_batches: SweepResult
    both: SweepResult


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Compared:
    """Both training runs have one prompt pool and one seed, so E and U have the same prompts, and other responses."""
    home = tmp_path_factory.mktemp("compared")
    make_run(home / "run")
    write_reward(home)
    model = build_model(SHAPE)
    faster = torch.optim.AdamW(trainer_groups(model), lr=3 * LEARNING_RATE, betas=(0.9, 0.99))
    for step, optimizer in train(model, 5, optimizer=faster):
        if f"checkpoint-{step}" in NAMES:
            save_checkpoint(home / "faster" / f"checkpoint-{step}", model, optimizer, step)
    store = Store(home / "artifacts")

    def sweep(name: str, *training_runs: str, **batch: int) -> SweepResult:
        asked = {"name": name, "checkpoints": [str(home / run) for run in training_runs], "batch_config": BATCH | batch}
        importance = {"etas": [0, 1], "estimators": ["per_decision", "snis"]}
        return probe(config_of(home, importance=importance, execution={"shard_size": 16}, **asked)).result

    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        other_batches, first = sweep("slow", "run", E_batch_seed=7, U_batch_seed=9), sweep("slow", "run")
        counting = Counting(store, Execution())
        asked = VarianceRequest(run=first.run_id, artifacts=str(store.root), baseline="ridge")
        ridge = statistics.variance(asked, store, counting)
        both = sweep("both", "run", "faster")
        return Compared(store, first, ridge, sweep("fast", "faster"), other_batches, both)
