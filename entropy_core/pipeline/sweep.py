"""Run a sweep over checkpoints."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from entropy_core.config.lab import RehearseConfig
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.files.functions import imported_files
from entropy_core.files.sources import Sources, content_digest
from entropy_core.losses import functions as user_losses
from entropy_core.losses import token_weights
from entropy_core.losses.interventions import own_interventions
from entropy_core.pipeline.final_stages import ASKED_FOR
from entropy_core.pipeline.kept_vectors import OtherNumbers, VectorKeeper
from entropy_core.pipeline.loading import load_checkpoint, load_pool, source_of
from entropy_core.pipeline.measure import Measurement, keep
from entropy_core.pipeline.preflight import CheckpointToProbe, settled_config
from entropy_core.pipeline.repairs import with_repairs
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.pipeline.statistics import SweepResult, record, reported
from entropy_core.rewards import functions as rewards
from entropy_core.store.artifact import Artifact, upstream
from entropy_core.store.manifest import recipe_key
from entropy_core.store.relatives import Relatives
from entropy_core.store.store import Stage, Store, recipe_of

log = logging.getLogger("entropy_probe.pipeline")


def execution_for(
    config: ProbeConfig,
    checkpoints: Sequence[CheckpointToProbe],
    progress: Callable[[int, int], None] = Execution.progress,
) -> Execution:
    """Return the execution settings of a sweep."""
    config = settled_config(config, checkpoints)
    paths = Sources({digest: path for checkpoint in checkpoints for digest, path in checkpoint.paths.items()})
    of_users = [rewards.source_file(name) for name in config.update.rewards]
    of_users.append(user_losses.source_file(config.update.loss))
    of_users += map(token_weights.source_file, own_interventions(config.interventions))
    beside = [path for file in of_users if file for path in imported_files(file).values()]
    for file in (source_of(config), *of_users, *beside):
        if file is not None:
            paths[content_digest(file)] = file
    return Execution(
        paths=paths,
        device=config.execution.device,
        devices_per_policy=config.execution.devices_per_policy,
        gen_batch_size=config.generation.gen_batch_size,
        tf_batch_size=config.generation.tf_batch_size,
        tf_batch_tokens=config.generation.tf_batch_tokens,
        head_chunk_megabytes=config.execution.head_chunk_megabytes,
        isolation=config.execution.isolation,
        vllm_python=config.execution.vllm_python,
        vllm_memory=config.execution.vllm_memory,
        progress=progress,
    )


def sweep(
    config: ProbeConfig,
    checkpoints: Sequence[CheckpointToProbe],
    store: Store,
    run: Runner,
    rerun_of: str = "",
    earlier: Sequence[Inputs] = (),
) -> SweepResult:
    """Probe every checkpoint and write the report.

    Args:
        config: configuration of the sweep.
        checkpoints: checkpoints from `preflight`.
        store: the store of the artifacts.
        run: runner of stages.
        rerun_of: the recorded run that this one adds interventions to; empty for a sweep of its own.
        earlier: what is recorded of checkpoints that were probed before and may be gone; see `recorded.read_run`. They
            are in the report, too, unless they have the name of one that is probed now.

    Returns:
        The report, and the run folder with `results.parquet`, `report.md`, figures, `config.yaml` and `run.json`.
    """
    config = settled_config(config, checkpoints)

    def work() -> SweepResult:
        keeper = VectorKeeper(store, run, config.execution.keep_vectors)
        measured = _measured(config, checkpoints, keeper, keeper.release)
        recorded = _with_earlier(measured, earlier)
        return record(recorded, reported(recorded, config, run), config, store, rerun_of)

    with store.in_use():
        if config.execution.library_versions == "same":
            _require_same_versions(config, checkpoints, store)
        return with_repairs(store, work)


def go_through(
    config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe], look: Callable[[Stage, Inputs, str], Artifact]
) -> None:
    """Request every stage of a sweep in order, without recording a run.

    Args:
        config: configuration of the sweep.
        checkpoints: checkpoints from `preflight`.
        look: runner of stages, which may return `Promised` artifacts.
    """
    run, config = Runner(look), settled_config(config, checkpoints)
    reported(_measured(config, checkpoints, run), config, run)


class Promised(Artifact):
    """Placeholder for an artifact in a dry run of a sweep."""

    @property
    def summary(self) -> dict[str, Any]:
        """Summary with values that make every stage run; they enter no key, because dependents are `Promised`."""
        return {"learning_rate": 1.0, "half_width": 1.0, "notes": [], "relative_differences": [], "changes": []}


def _require_same_versions(config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe], store: Store) -> None:
    """Refuse to continue a sweep whose cached results were made with other releases of the libraries."""
    relatives = Relatives(store)
    others: dict[str, tuple[str, str]] = {}

    def look(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        if not all(one["digest"] for one in upstream(inputs)):
            return Promised(stage.name, "", "", Path())
        recipe = recipe_of(stage, inputs)
        if manifest := store.manifest(stage.name, recipe_key(recipe)):
            return Artifact(stage.name, manifest["key"], manifest["digest"], store.root)
        for made in relatives.of(recipe):
            if made["code"] == recipe["code"]:
                then, now = made["libraries"], recipe["libraries"]
                others.update({name: (then.get(name, ""), now[name]) for name in now if then.get(name) != now[name]})
        return Promised(stage.name, "", "", Path())

    go_through(config, checkpoints, look)
    if others:
        then, now = (", ".join(f"{name} {pair[i] or '(none)'}" for name, pair in others.items()) for i in (0, 1))
        raise StoreError(
            f"results of this sweep in {store.root} were made with {then}, and here is {now}",
            cause="libraries were upgraded since, which can change numbers: one sweep mixes no two releases",
            fix=f"install {then} again to go on; or run `entropy-probe store adopt CONFIG`, which "
            "recomputes one artifact of each stage and takes the others over where it is equal; or compute everything "
            "anew with execution.library_versions: recompute",
        )


def _measured(
    config: ProbeConfig,
    checkpoints: Sequence[CheckpointToProbe],
    run: Runner,
    release: Callable[[Artifact], None] = keep,
) -> list[Inputs]:
    """Run all stages that need a policy; return the inputs of the variance stage for each checkpoint."""
    optimizers = [
        load_checkpoint(config, checkpoint, run) for checkpoint in checkpoints
    ]  # before any sampling, to find broken ones early
    by_tokenizer: dict[str, dict[str, Artifact]] = {}  # a run usually has a single tokenizer
    for tokenizer in dict.fromkeys(checkpoint.tokenizer for checkpoint in checkpoints):
        by_tokenizer[tokenizer] = {s: load_pool(config, s, tokenizer, run) for s in dict.fromkeys(config.splits)}

    def measure(checkpoint: CheckpointToProbe, optimizer: Artifact) -> tuple[Inputs, Measurement]:
        pools = by_tokenizer[checkpoint.tokenizer]
        of_one = config if checkpoint is checkpoints[-1] else without_rehearsal(config)
        measurement = Measurement(of_one, checkpoint, optimizer, pools, run, release)
        inputs = run.part(checkpoint.name, partial(_variance_inputs, measurement))
        of_pools = [note for pool in pools.values() for note in pool.summary["notes"]]
        entry = {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "inputs": inputs,
            **{of: measurement.asked_for.get(of, {}) for of in ASKED_FOR},
            "notes": [*checkpoint.assumptions, *of_pools, *measurement.notes],
            "settings": [setting._asdict() for setting in checkpoint.settings],
            "warnings": [*checkpoint.warnings, *measurement.warnings],
            "log": dict(checkpoint.log),
        }
        return entry, measurement

    calls = [partial(measure, *pair) for pair in zip(checkpoints, optimizers, strict=True)]
    # where vectors are not kept there is little room, and then one checkpoint at a time has its own
    found = run.together(calls) if config.execution.keep_vectors else [call() for call in calls]
    measured = [entry for entry, _ in found]
    dropped = [one.with_dropout.summary for _, one in found if one.with_dropout]
    bases = [said for _, one in found if (said := one.said_of_bases())]
    for entry in measured:
        entry["warnings"] += [*dropout_sizes(dropped), *bases]
    return measured


def without_rehearsal(config: ProbeConfig) -> ProbeConfig:
    """The configuration for all checkpoints but the last."""
    lab = config.lab.model_copy(update={"rehearse": RehearseConfig()})
    return config.model_copy(update={"lab": lab})


def _variance_inputs(measurement: Measurement) -> Inputs:
    try:
        return measurement.variance_inputs()
    except OtherNumbers as error:  # another device or thread count gives other bits; do not mix
        log.warning("%s, and all that depends on it is computed again, too", error)
        return measurement.variance_inputs()


def _with_earlier(measured: list[Inputs], earlier: Sequence[Inputs]) -> list[Inputs]:
    names = {entry["checkpoint"] for entry in measured}
    kept = [entry for entry in earlier if entry["checkpoint"] not in names]
    return sorted([*kept, *measured], key=lambda entry: entry["step"]) if kept else measured


def dropout_sizes(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the trainer's dropout does to the step.

    Args:
        summaries: of dropout-u, of each checkpoint whose trainer had dropout on.

    Returns:
        A sentence; none without such a checkpoint.
    """
    apart = [value for summary in summaries for value in summary["relative_differences"]]
    changes = [value for summary in summaries for value in summary["changes"]]
    if not apart:
        return []
    of_entropy = f", and δH₁ changes by {_range(changes)}" if changes else ""
    return [
        f"With dropout on as in the trainer's step, over {len(apart)} draws of its masks, v differs by {_range(apart)} "
        f"of its norm{of_entropy}."
    ]


def _range(values: Sequence[float]) -> str:
    """The smallest and the largest, and the mean."""
    low, high, mean = min(values), max(values), sum(values) / len(values)
    return f"{low:.2%} to {high:.2%} (mean {mean:.2%})"
