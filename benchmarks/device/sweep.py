"""One whole sweep of a small checkpoint on a device, held against the same sweep on the CPU, artifact by artifact.

And its stages in a pool of workers, held against those in one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device.models import write_checkpoint
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.memory import run_within_memory
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.sweep import execution_for, go_through
from entropy_core.policy.pretrained import load_policy
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from entropy_core.workers.choice import workers_of

# The numbers compared are float32. A difference of nearly equal numbers, such as a change of the entropy, has fewer
# correct digits than the numbers themselves.
# The sensitivity of an entropy is a sum over the vocabulary of terms that cancel.
TOLERANCE = {"sample-e-batch": 0.0, "sample-u-batch": 0.0, "first-order-u": 3e-4, "variance": 1e-2}
USUAL_TOLERANCE = 1e-4
OF_SECOND_ORDER = 0.2  # what a step of this size leaves of ΔH after the first order has few digits more than the noise
ARE_ERRORS = ("gradient_check", "attribution_closure", "noise_floor", "closure", "remainder", "remainder_se")
"""Columns of rounding errors, or of what is left when nearly all cancels. They are as large on every device, but not
the same numbers."""

REWARD = '''"""A reward that an untrained policy gets different amounts of."""


def share_of_low_digits(completions, **_):
    return [sum(c in "01234" for c in text) / 4 for text in completions]
'''


class Difference(NamedTuple):
    """The largest error among the numbers of a stage, relative to the largest number of the column it is in."""

    stage: str
    column: str
    error: float

    @property
    def tolerance(self) -> float:
        """The largest error that rounding alone may cause."""
        if self.column.startswith("estimates.parquet:delta_h2"):
            return OF_SECOND_ORDER
        return TOLERANCE.get(self.stage, USUAL_TOLERANCE)


class Done(NamedTuple):
    """A stage that was run."""

    stage: Stage
    inputs: Inputs
    artifact: Artifact


def differences(folder: Path, device: str, devices: int = 1, **changes: Mapping[str, Any]) -> Iterator[Difference]:
    """The largest difference of every stage between the CPU and a device, which also has other micro-batches.

    Args:
        folder: an empty folder, for a checkpoint, a reward and two stores.
        device: its name.
        devices: number of them that share the layers.
        changes: sections of the configuration, whose values replace those of `swept`.

    Yields:
        A difference per stage, in the order of the sweep.

    Raises:
        ValueError: the two sweeps made different artifacts.
    """
    checkpoint = write_checkpoint(folder / "checkpoint-3")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    on_cpu = swept(checkpoint, folder / "cpu", changes, device="cpu")
    other = {"device": device, "devices_per_policy": devices, "gen_batch_size": 24, "tf_batch_size": 7}
    on_device = swept(checkpoint, folder / "device", changes, **other)
    if [one.stage for one in on_cpu] != [one.stage for one in on_device]:
        raise ValueError("the sweeps on the CPU and on the device ran different stages")
    yield from _largest([one.artifact for one in on_device], [one.artifact for one in on_cpu])


def pool_differences(folder: Path, device: str, **execution: Any) -> Iterator[Difference]:
    """The largest difference of every stage between one process and a pool of workers, which computes all at once.

    Args:
        folder: an empty folder.
        device: what both compute on.
        execution: settings of the pool, such as the number of workers.

    Yields:
        A difference per stage that needs the policy.
    """
    checkpoint = write_checkpoint(folder / "checkpoint-3")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    alone = [one for one in swept(checkpoint, folder / "alone", {}, device=device) if "policy" in one.inputs]
    pooled = {"execution": {"workers": "pool", "device": device, "artifacts": str(folder / "pool"), **execution}}
    config = _config(checkpoint, folder / "pool", pooled)
    store, settings = Store(config.store_root), execution_for(config, preflight(config))
    with workers_of(config.execution, run_within_memory) as workers:
        calls = [partial(workers.compute, store, one.stage, settings, one.inputs) for one in alone]
        found = workers.threads.all(calls)
    yield from _largest(found, [one.artifact for one in alone])


def _largest(found: Sequence[Artifact], expected: Sequence[Artifact]) -> list[Difference]:
    """The largest difference of every stage."""
    largest: dict[str, Difference] = {}
    for one, other in zip(found, expected, strict=True):
        stage = one.stage
        for column, error in _errors(_numbers(one), _numbers(other)):
            if stage not in largest or error > largest[stage].error:
                largest[stage] = Difference(stage, column, error)
    return list(largest.values())


def swept(
    checkpoint: Path, store: Path, changes: Mapping[str, Mapping[str, Any]], **execution_changes: Any
) -> list[Done]:
    """Sweep a checkpoint. The reward's file is in the folder that holds the checkpoint.

    Args:
        checkpoint: its directory.
        store: where artifacts go.
        changes: as in `differences`.
        execution_changes: fields of `Execution`, such as the device.

    Returns:
        Every stage with its artifact, in order; without the report, which draws figures.
    """
    config = _config(checkpoint, store, changes)
    checkpoints = preflight(config)
    execution = replace(execution_for(config, checkpoints), **execution_changes)
    found: list[Done] = []

    def run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        if stage.name == "report":
            return found[-1].artifact
        found.append(Done(stage, inputs, run_within_memory(Store(config.store_root), stage, execution, inputs)))
        return found[-1].artifact

    load_policy.cache_clear()
    go_through(config, checkpoints, run)
    load_policy.cache_clear()
    return found


def _config(checkpoint: Path, store: Path, changes: Mapping[str, Mapping[str, Any]]) -> ProbeConfig:
    defaults: dict[str, Any] = {
        "batch_config": {"E_total_sequences": 64, "B_U": 8, "G": 4},
        "generation": {"max_new_tokens": 16, "gen_batch_size": 32, "tf_batch_size": 16},
        "update": {"reward": f"{checkpoint.parent / 'reward.py'}:share_of_low_digits", "max_grad_norm": 0.1},
        "importance": {"etas": [0, 1], "estimators": ["per_decision", "path_integral"]},
        "execution": {"shard_size": 32, "artifacts": str(store)},
    }
    sections = {name: defaults.get(name, {}) | dict(changes.get(name, {})) for name in defaults | changes}
    return parse_config(sections | {"checkpoints": [str(checkpoint)]})


def _numbers(artifact: Artifact) -> dict[str, Tensor]:
    """Every tensor of an artifact, and every column of numbers."""
    found: dict[str, Tensor] = {}
    for name in artifact.manifest["files"]:
        if name.endswith(".safetensors"):
            found |= {f"{name}:{key}": tensor for key, tensor in artifact.tensors(name).items()}
        elif name.endswith(".parquet"):
            table = artifact.table(name)
            for column in table.column_names:
                cells = table[column].to_pylist()
                if column not in ARE_ERRORS and cells and all(isinstance(cell, int | float) for cell in cells):
                    found[f"{name}:{column}"] = torch.tensor(cells, dtype=torch.float64)
    return found


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    if found.keys() != expected.keys():
        raise ValueError(f"the device made {sorted(found)}, and the CPU {sorted(expected)}")
    for column, values in expected.items():
        if found[column].shape != values.shape:
            yield column, float("inf")
        elif values.numel():
            error = (found[column].double() - values.double()).abs().max()
            yield column, float(error / values.double().abs().max().clamp_min(1e-30)) if error else 0.0
