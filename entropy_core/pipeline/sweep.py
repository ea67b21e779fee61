"""Run a sweep over checkpoints, or rerun the statistics of a recorded sweep."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropy_core.config import plain_yaml
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.files.checkpoint import weights_digest
from entropy_core.files.sources import Sources, content_digest
from entropy_core.losses import functions as user_losses
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.kept_vectors import OtherNumbers, VectorKeeper
from entropy_core.pipeline.measure import Measurement, keep, load_checkpoint, load_pool, source_of
from entropy_core.pipeline.preflight import CheckpointToProbe, settled_config, splits
from entropy_core.pipeline.repairs import with_repairs
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.pipeline.settings import Setting
from entropy_core.rewards import functions as rewards
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact, artifacts_in, upstream
from entropy_core.store.inputs import require_inputs
from entropy_core.store.manifest import recipe_key
from entropy_core.store.relatives import Relatives
from entropy_core.store.store import Stage, Store, recipe_of

log = logging.getLogger("entropy_probe.pipeline")

RECORD_FORMAT = 4
"""Format version of run.json, incremented when the inputs of the variance stage or the recorded data change."""


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep: its report artifact, and the run folder with copies of the result files."""

    run_id: str
    run_directory: Path
    report: Artifact


def execution_for(
    config: ProbeConfig,
    checkpoints: Sequence[CheckpointToProbe],
    progress: Callable[[int, int], None] = Execution.progress,
) -> Execution:
    """Return the execution settings of a sweep."""
    config = settled_config(config, checkpoints)
    paths = Sources({digest: path for checkpoint in checkpoints for digest, path in checkpoint.paths.items()})
    if config.update.reference:
        reference = Path(config.update.reference).resolve()
        paths.setdefault(weights_digest(reference), reference)
    of_functions = rewards.source_file(config.update.reward), user_losses.source_file(config.update.loss)
    for file in (source_of(config), *of_functions):
        if file is not None:
            paths[content_digest(file)] = file
    return Execution(
        paths=paths,
        device=config.execution.device,
        gen_batch_size=config.generation.gen_batch_size,
        tf_batch_size=config.generation.tf_batch_size,
        head_chunk_megabytes=config.execution.head_chunk_megabytes,
        isolation=config.execution.isolation,
        progress=progress,
    )


def sweep(config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe], store: Store, run: Runner) -> SweepResult:
    """Probe every checkpoint and write the report.

    Args:
        config: configuration of the sweep.
        checkpoints: checkpoints from `preflight`.
        store: the store of the artifacts.
        run: runner of stages.

    Returns:
        The report, and the run folder with `results.parquet`, `report.md`, figures, `config.yaml` and `run.json`.
    """
    config = settled_config(config, checkpoints)

    def work() -> SweepResult:
        keeper = VectorKeeper(store, run, config.execution.keep_vectors)
        recorded = _measured(config, checkpoints, keeper, keeper.release)
        return _record(recorded, _reported(recorded, config, run), config, store)

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
    _reported(_measured(config, checkpoints, run), config, run)


class Promised(Artifact):
    """Placeholder for an artifact in a dry run of a sweep."""

    @property
    def summary(self) -> dict[str, Any]:
        """Summary with values that make every stage run; they enter no key, because dependents are `Promised`."""
        return {"learning_rate": 1.0, "half_width": 1.0, "notes": []}


def variance(request: VarianceRequest, store: Store, run: Runner) -> SweepResult:
    """Rerun the statistics of a recorded sweep with other settings, from cached columns alone.

    Args:
        request: the recorded run, and the new settings.
        store: the store of the artifacts.
        run: runner of stages.

    Returns:
        The report, and the folder of the new run, as from `sweep`.

    Raises:
        StoreError: the run does not exist, or one of its artifacts is missing; names the artifact.
        ConfigError: the run was recorded by a version with different settings.
    """
    directory = runs.find(store.root, request.run)
    with runs.understood(directory / runs.RECORD) as record:
        found = record.get("format")
    if found != RECORD_FORMAT:
        raise StoreError(
            f"run {directory.name} was recorded in format {found}, and this is {RECORD_FORMAT}",
            cause="another version of entropy-probe recorded it",
            fix=f"`entropy-probe sweep {directory / 'config.yaml'}`: what is cached is reused",
        )
    config = parse_config(record["config"], str(directory / runs.RECORD))
    config = config.model_copy(update={"variance": request.applied_to(config.variance)})
    runs.named(store.root, directory.name)  # nothing but artifacts
    with runs.understood(directory / runs.RECORD) as record:
        recorded = [entry | {"inputs": _revive(entry["inputs"], store)} for entry in record["checkpoints"]]
        for entry in recorded:
            require_inputs(stage.VARIANCE, entry["inputs"] | _chosen(config))
            texts = (entry["checkpoint"], *entry["notes"], *entry["warnings"])
            if type(entry["step"]) is not int or {type(text) for text in texts} != {str}:
                raise TypeError("the name, the step or a note of a checkpoint is of another type")
            _ = [Setting(**setting) for setting in entry["settings"]]
        require_inputs(stage.AGREEMENT, _compared(recorded, config))

    def work() -> SweepResult:
        for entry in recorded:
            for artifact in artifacts_in(entry["inputs"]):
                if store.find(artifact.stage, artifact.key) is None:
                    raise StoreError(
                        f"the artifact {artifact.stage}/{artifact.key} of {entry['checkpoint']} is not in {store.root}",
                        cause="it was deleted, or the store was moved without it",
                        fix=f"make it again: `entropy-probe sweep {directory / 'config.yaml'}`",
                    )
        return _record(recorded, _reported(recorded, config, run), config, store)

    with store.in_use():
        return with_repairs(store, work)


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
    measured = []
    for checkpoint, optimizer in zip(checkpoints, optimizers, strict=True):
        if checkpoint.tokenizer not in by_tokenizer:
            asked = dict.fromkeys(splits(config))
            by_tokenizer[checkpoint.tokenizer] = {s: load_pool(config, s, checkpoint.tokenizer, run) for s in asked}
        pools = by_tokenizer[checkpoint.tokenizer]
        measurement = Measurement(config, checkpoint, optimizer, pools, run, release)
        try:
            inputs = measurement.variance_inputs()
        except OtherNumbers as error:  # another device or thread count gives other bits; do not mix
            log.warning("%s, and all that depends on it is computed again, too", error)
            inputs = measurement.variance_inputs()
        of_pools = [note for pool in pools.values() for note in pool.summary["notes"]]
        measured.append(
            {
                "checkpoint": checkpoint.name,
                "step": checkpoint.step,
                "inputs": inputs,
                "notes": [*checkpoint.assumptions, *of_pools],
                "settings": [setting._asdict() for setting in checkpoint.settings],
                "warnings": list(checkpoint.warnings),
                "log": dict(checkpoint.log),
            }
        )
    return measured


def _reported(recorded: list[Inputs], config: ProbeConfig, run: Runner) -> Artifact:
    """Run the variance stage of every checkpoint, the agreement stage, and the report stage."""
    estimated = [
        {
            "checkpoint": entry["checkpoint"],
            "step": entry["step"],
            "estimates": run(stage.VARIANCE, entry["inputs"] | _chosen(config), entry["checkpoint"]),
            "attribution": entry["inputs"]["first_order_u"],
        }
        for entry in recorded
    ]
    notes = list(dict.fromkeys([note for entry in recorded for note in entry["notes"]] + assumptions(config)))
    agreement = run(stage.AGREEMENT, _compared(recorded, config), config.name)
    inputs = {"name": config.name, "checkpoints": estimated, "agreement": agreement, "notes": notes}
    said = {"settings": recorded[0]["settings"], "warnings": recorded[0]["warnings"]}
    return run(stage.REPORT, inputs | said, config.name)


def _compared(recorded: list[Inputs], config: ProbeConfig) -> Inputs:
    """Return the inputs of the agreement stage."""
    names = ("learning_rate", "scores", "scores_u", "update")
    e_split, u_split = splits(config)
    return {
        "checkpoints": [
            {name: entry[name] for name in ("checkpoint", "step", "log")}
            | {name: entry["inputs"][name] for name in names}
            for entry in recorded
        ],
        "temperature": config.generation.temperature,
        "same_prompts": e_split == u_split,
    }


def _chosen(config: ProbeConfig) -> Inputs:
    """Return the settings of the variance stage."""
    return config.variance.model_dump(mode="json", exclude={"cluster"}) | {"units": config.units_of_e}


def _record(recorded: list[Inputs], report: Artifact, config: ProbeConfig, store: Store) -> SweepResult:
    """Write the folder of the run and return the result."""
    run_id = f"{config.name}-{report.digest[:12]}"  # equal results give the same run id
    document = config.model_dump(mode="json")
    record = {
        "format": RECORD_FORMAT,
        "run_id": run_id,
        "finished": datetime.now(UTC).isoformat(),
        "config": document,
        "report": report.to_dict(),
        "checkpoints": [entry | {"inputs": _freeze(entry["inputs"])} for entry in recorded],
    }
    with runs.writing(store, run_id) as folder:
        for file in report.manifest["files"]:
            shutil.copyfile(report.path(file), folder / file)
        (folder / "config.yaml").write_text(plain_yaml.dump(document), encoding="utf-8")
        (folder / runs.RECORD).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    return SweepResult(run_id, runs.folder(store.root, run_id), report)


def assumptions(config: ProbeConfig) -> list[str]:
    """List the settings that a checkpoint does not record and that come from the configuration, as sentences."""
    update = config.update
    divided = {"group": "divided", "none": "not divided"}.get(update.scale_rewards)
    scaled = f" (advantages {divided} by the standard deviation of their group)" if divided else ""
    clipping = f"clipped at global norm {update.max_grad_norm:g}" if update.max_grad_norm else "not clipped"
    reference = f"`{Path(update.reference).name}`" if update.reference else "the base without its adapter"
    kl = f"with {update.kl_beta:g} · KL to {reference}" if update.kl_beta else "without a KL term"
    return [
        f"The step is that of the `{Path(update.loss).name}` loss{scaled} on {config.batch_config.B_U} prompts "
        f"× {config.batch_config.G} responses with the reward `{Path(update.reward).name}`, its gradient {clipping}; "
        f"on-policy, {kl}, cut responses included.",
        f"Responses are sampled at temperature {config.generation.temperature:g} without truncation of the law and "
        f"cut at {config.generation.max_new_tokens} tokens; the policy is computed in {config.policy.dtype}.",
    ]


def _freeze(value: Any) -> Any:
    """Convert inputs to JSON, with artifacts as references."""
    if isinstance(value, Artifact):
        return {"artifact": value.to_dict()}
    if isinstance(value, Mapping):
        return {key: _freeze(item) for key, item in value.items()}
    return [_freeze(item) for item in value] if isinstance(value, list | tuple) else value


def _revive(value: Any, store: Store) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"artifact"}:
            return Artifact.from_dict(value["artifact"], store.root)
        return {key: _revive(item, store) for key, item in value.items()}
    return [_revive(item, store) for item in value] if isinstance(value, list) else value
