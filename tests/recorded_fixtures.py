"""A run of TRL that saved every step with its token ids, and what the probe makes of the batch of a step."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pipeline_fixtures import Probe, probe, values
from safetensors.torch import load_file
from torch import Tensor
from trainer_rewards import low_digits
from watch_trainer import trainer

from entropy_core.demo.training_run import quiet
from entropy_core.files.run_folder import FOLDER

STEPS = 3
REWARD = f"{Path(__file__).with_name('trainer_rewards.py')}:low_digits"


def recorded_run(run: Path, change: Callable[[Any], None] = lambda made: None, **settings: Any) -> Path:
    """Train a tiny policy; returns the folder with the batches of its steps."""
    given = {"save_steps": 1, "save_total_limit": None, "learning_rate": 1e-2, "weight_decay": 0.1}
    given |= {"log_completions": True, "num_completions_to_print": 0}
    with torch.random.fork_rng(devices=[]), quiet(threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(run, STEPS, low_digits, **given | settings)
        change(made)
        made.train()
    return run / FOLDER / "batches"


def asked(run: Path, artifacts: Path, step: int = STEPS - 1, **sections: Any) -> dict[str, Any]:
    """A configuration that takes U from the run."""
    batch = {"U": {"from": str(run / FOLDER / "batches")}} | sections.pop("batch_config", {})
    given = values(
        run,
        artifacts,
        checkpoints=[str(run / f"checkpoint-{step}")],
        update={"reward": REWARD},
        importance={"etas": [0, 1]},
        **sections,
    )
    del given["generation"]["max_new_tokens"]
    return given | {"batch_config": {"E_total_sequences": 16} | batch}


def predicted(run: Path, artifacts: Path, step: int = STEPS - 1, **sections: Any) -> Probe:
    return probe(asked(run, artifacts, step, **sections))


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}


def change_of(run: Path, step: int = STEPS - 1) -> dict[str, Tensor]:
    """What the trainer's step after a checkpoint made of the weights."""
    before, after = weights(run / f"checkpoint-{step}"), weights(run / f"checkpoint-{step + 1}")
    return {name: after[name] - before[name] for name in before}


def rewritten(
    batches: Path, step: int, target: Path, change: Callable[[dict[str, Any], int], Mapping[str, Any]]
) -> Path:
    """The rows of a step's batch, each as it is changed, in another file; its suffix says of which kind."""
    rows = [
        dict(change(row, i)) for i, row in enumerate(pq.read_table(batches / f"checkpoint-{step}.parquet").to_pylist())
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), target)
    else:
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target
