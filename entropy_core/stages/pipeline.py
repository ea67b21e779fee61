"""The stages in order: one sweep over checkpoints, and the statistics of a recorded sweep again.

What runs a stage is a parameter: `run(stage, inputs, label) -> Artifact`. Without Prefect it is `direct_runner`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

from entropy_core import prompts, rewards
from entropy_core.artifact import Artifact
from entropy_core.config import ProbeConfig, VarianceRequest, parse_config
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.stages import catalogue as stage
from entropy_core.stages.files import content_digest
from entropy_core.stages.preflight import CheckpointToProbe, encoding, splits
from entropy_core.store import Stage, Store

Inputs = dict[str, Any]

NOISE_DRAWS, NOISE_SEQUENCES = 4, 1024
"""Ways to round, and on how many sequences: enough for the size of the noise, and less work than one step size."""
RECORD_FORMAT = 1
"""Of run.json: raised when the inputs of the variance stage change."""


class Runner(Protocol):
    """Runs a stage, or finds its result."""

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """The artifact of this stage for these inputs; `label` is for people."""


def direct_runner(store: Store, execution: Execution) -> Runner:
    """A runner that calls the stages in this process."""

    def run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        return store.run(stage, execution, inputs)

    return run


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves: its report, and the folder with copies of the files people open."""

    run_id: str
    run_directory: Path
    report: Artifact


def execution_for(
    config: ProbeConfig,
    checkpoints: Sequence[CheckpointToProbe],
    progress: Callable[[int, int], None] = Execution.progress,
) -> Execution:
    """The execution settings of a sweep."""
    paths = {digest: c.directory for c in checkpoints for digest in (c.digest, c.weights, c.tokenizer)}
    for file in (_dataset(config), rewards.source_file(config.update.reward)):
        if file is not None:
            paths[content_digest(file)] = file
    return Execution(
        paths=paths,
        device=config.execution.device,
        gen_batch_size=config.generation.gen_batch_size,
        tf_batch_size=config.generation.tf_batch_size,
        head_chunk_rows=config.execution.head_chunk_rows,
        progress=progress,
    )


def sweep(config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe], store: Store, run: Runner) -> SweepResult:
    """Probe every checkpoint and report.

    Args:
        config: what to do.
        checkpoints: of `preflight`.
        store: where artifacts are.
        run: runs a stage.

    Returns:
        The report, and the run's folder with `results.parquet`, `report.md`, figures, `config.yaml` and `run.json`.
    """
    by_tokenizer: dict[str, dict[str, Artifact]] = {}  # a run has one, as a rule
    recorded = []
    for checkpoint in checkpoints:
        if checkpoint.tokenizer not in by_tokenizer:
            asked = dict.fromkeys(splits(config))
            by_tokenizer[checkpoint.tokenizer] = {s: _load_prompts(config, s, checkpoint, run) for s in asked}
        pools = by_tokenizer[checkpoint.tokenizer]
        recorded.append(
            {
                "checkpoint": checkpoint.name,
                "step": checkpoint.step,
                "inputs": _measure(config, checkpoint, pools, run),
                "notes": [
                    *checkpoint.assumptions,
                    *(note for pool in pools.values() for note in pool.summary["notes"]),
                ],
            }
        )
    return _conclude(recorded, config, store, run)


def variance(request: VarianceRequest, store: Store, run: Runner) -> SweepResult:
    """The statistics of a recorded sweep with other settings, from cached columns alone.

    Args:
        request: which run, and the settings.
        store: where artifacts are.
        run: runs a stage.

    Returns:
        As `sweep`.

    Raises:
        StoreError: there is no such run, or an artifact that it needs is gone; names it.
        ConfigError: the run was recorded by a version with other settings.
    """
    directory = find_run(store.root, request.run)
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    if record.get("format") != RECORD_FORMAT:
        raise StoreError(
            f"run {directory.name} was recorded in format {record.get('format')}, and this is {RECORD_FORMAT}",
            cause="another version of entropy-probe recorded it",
            way_out=f"run entropy-probe/checkpoint-sweep with {directory / 'config.yaml'}: what is cached is reused",
        )
    config = parse_config(record["config"], str(directory / "run.json"))
    recorded = [entry | {"inputs": _revive(entry["inputs"], store)} for entry in record["checkpoints"]]
    for entry in recorded:
        for artifact in artifacts_in(entry["inputs"]):
            if store.find(artifact.stage, artifact.key) is None:
                raise StoreError(
                    f"the artifact {artifact.stage}/{artifact.key} of {entry['checkpoint']} is not in {store.root}",
                    cause="it was deleted, or the store was moved without it",
                    way_out=f"make it again: run entropy-probe/checkpoint-sweep with {directory / 'config.yaml'}",
                )
    config = config.model_copy(update={"variance": request.applied_to(config.variance)})
    return _conclude(recorded, config, store, run)


def find_run(root: Path, run_id: str) -> Path:
    """The folder of a recorded run.

    Raises:
        StoreError: there is none.
    """
    known = [name for _, name in sorted(_recorded(root))]
    if run_id == "latest" and known:
        return root / "runs" / known[-1]
    if run_id in known:
        return root / "runs" / run_id
    listed = f"recorded are {', '.join(known)}" if known else "no sweep is recorded there"
    raise StoreError(
        f"there is no run {run_id!r} in {root / 'runs'}; {listed}",
        way_out="give one of these ids, or run entropy-probe/checkpoint-sweep first",
    )


def _recorded(root: Path) -> Iterator[tuple[str, str]]:
    """When each run finished, and its id."""
    for path in (root / "runs").glob("*/run.json"):
        with suppress(ValueError, LookupError, TypeError):  # a record that cannot be read is none
            yield json.loads(path.read_text(encoding="utf-8"))["finished"], path.parent.name


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """Every artifact in nested inputs."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from artifacts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifacts_in(item)


def _dataset(config: ProbeConfig) -> Path | None:
    batch = config.batch_config
    return prompts.locate(batch.dataset_name, batch.dataset_path, batch.allow_download)


def _load_prompts(config: ProbeConfig, split: str, checkpoint: CheckpointToProbe, run: Runner) -> Artifact:
    batch, source = config.batch_config, _dataset(config)
    inputs = {
        "dataset_name": "" if batch.dataset_name.endswith(prompts.SUFFIXES) else batch.dataset_name,
        "options": batch.dataset_options,
        "split": split,
        "prompt_column": batch.prompt_column,
        "source": content_digest(source) if source else "",  # a file counts by its content, wherever it lies
        "revision": prompts.revision(source) if source else "",
        "library": prompts.library(batch.dataset_name),
        "tokenizer": checkpoint.tokenizer,
        "encoding": encoding(config),
    }
    return run(stage.LOAD_PROMPTS, inputs, f"{batch.dataset_name} {split}")


def _measure(config: ProbeConfig, checkpoint: CheckpointToProbe, pools: Mapping[str, Artifact], run: Runner) -> Inputs:
    """All that needs the policy, for one checkpoint; returns the inputs of the variance stage."""
    batch, generation, update = config.batch_config, config.generation, config.update
    law = {
        "weights": checkpoint.weights,
        "dtype": config.policy.dtype,
        "attn_implementation": config.policy.attn_implementation,
        "temperature": generation.temperature,
    }
    name = checkpoint.name
    e_pool, u_pool = (pools[split] for split in splits(config))
    sampling = {"law": law, "max_new_tokens": generation.max_new_tokens}
    replacement = batch.E_sampling_mode == "replacement"
    e_sampling = sampling | {
        "prompts": e_pool,
        "batch": "E",
        "mode": batch.E_sampling_mode,
        "responses_per_prompt": 1 if replacement else batch.G,
        "seed": batch.E_batch_seed,
    }
    u_sampling = sampling | {
        "prompts": u_pool,
        "batch": "U",
        "mode": "distinct",
        "responses_per_prompt": batch.G,
        "seed": batch.U_batch_seed,
    }
    e_total = batch.E_total_sequences if replacement else batch.B_E_values[0] * batch.G

    def over_shards(what: Stage, inputs: Sequence[Inputs], suffix: str = "") -> list[Artifact]:
        labels = (f"{name}{suffix} · shard {i}/{len(inputs)}" for i in range(1, len(inputs) + 1))
        return [run(what, shard, label) for shard, label in zip(inputs, labels, strict=True)]

    def shards(total: int) -> list[Inputs]:
        size = config.execution.shard_size
        return [{"first": first, "count": min(size, total - first)} for first in range(0, total, size)]

    e_batch = over_shards(stage.SAMPLE_E, [e_sampling | shard for shard in shards(e_total)])
    e_scored = [{"law": law, "sequences": sequences} for sequences in e_batch]
    scores = over_shards(stage.SCORE_E, e_scored)
    first = e_batch[: -(-NOISE_SEQUENCES // config.execution.shard_size)]
    again = {"law": law, "sequences": first, "count": min(NOISE_SEQUENCES, e_total)}
    rescores = [
        run(stage.RESCORE_E, again | {"draw": draw}, f"{name} · draw {draw + 1}/{NOISE_DRAWS}")
        for draw in range(NOISE_DRAWS)
    ]

    loaded = {"checkpoint": checkpoint.digest, "learning_rate": update.learning_rate}
    optimizer = run(stage.LOAD_CHECKPOINT, loaded, name)
    u_batch = over_shards(stage.SAMPLE_U, [u_sampling | shard for shard in shards(batch.B_U * batch.G)])
    reward_file = rewards.source_file(update.reward)
    rewarded = {
        "sequences": u_batch,
        "prompts": u_pool,
        "reward_name": update.reward.rpartition(".py:")[2],
        "source": content_digest(reward_file) if reward_file else "",
        "library": rewards.library(update.reward),
    }
    rewards_u = run(stage.REWARD_U, rewarded, name)
    step = {
        "law": law,
        "checkpoint": optimizer,
        "sequences": u_batch,
        "rewards": rewards_u,
        "responses_per_prompt": batch.G,
        "loss": update.loss,
        "max_new_tokens": generation.max_new_tokens,
        "max_grad_norm": update.max_grad_norm,
    }
    v = run(stage.COMPUTE_UPDATE, step, name)

    gradient = run(stage.ENTROPY_GRADIENT, {"law": law, "sequences": e_batch, "scores": scores}, name)
    along_v = [{"law": law, "sequences": sequences, "update": v} for sequences in e_batch]
    first_order_e = over_shards(stage.FIRST_ORDER_E, along_v)
    over_u = {"law": law, "sequences": u_batch, "update": v, "gradient": gradient}
    first_order_u = run(stage.FIRST_ORDER_U, over_u, name)
    learning_rate = optimizer.summary["learning_rate"]
    unit = learning_rate if config.importance.eta_unit == "learning_rate" else 1.0
    moved = []
    for multiple in config.importance.etas:
        eta, suffix = multiple * unit, f" · η={multiple * unit:.3g}"
        there = [inputs | {"eta": eta} for inputs in along_v] if eta else []  # at 0 the answer is known: no pass
        moved.append({"eta": eta, "shards": over_shards(stage.IMPORTANCE, there, suffix)})
    return {
        "learning_rate": learning_rate,
        "scores": scores,
        "rescores": rescores,
        "first_order_e": first_order_e,
        "first_order_u": first_order_u,
        "update": v,
        "moved": moved,
        "estimators": config.importance.estimators,
    }


def _conclude(recorded: list[Inputs], config: ProbeConfig, store: Store, run: Runner) -> SweepResult:
    """Statistics of every checkpoint, the report, and the run's folder."""
    name, chosen = config.name, config.variance.model_dump(mode="json", exclude={"cluster"})
    chosen["units"] = config.units_of_e
    estimated = [
        {
            "checkpoint": entry["checkpoint"],
            "step": entry["step"],
            "estimates": run(stage.VARIANCE, entry["inputs"] | chosen, entry["checkpoint"]),
            "attribution": entry["inputs"]["first_order_u"],
        }
        for entry in recorded
    ]
    notes = list(dict.fromkeys([note for entry in recorded for note in entry["notes"]] + assumptions(config)))
    report = run(stage.REPORT, {"name": name, "checkpoints": estimated, "notes": notes}, name)
    run_id = f"{name}-{report.digest[:12]}"  # the same results are the same run
    directory = store.root / "runs" / run_id
    directory.mkdir(parents=True, exist_ok=True)
    for file in report.manifest["files"]:
        shutil.copyfile(report.path(file), directory / file)
    document = config.model_dump(mode="json")
    (directory / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    record = {
        "format": RECORD_FORMAT,
        "run_id": run_id,
        "finished": datetime.now(UTC).isoformat(),
        "config": document,
        "report": report.to_dict(),
        "checkpoints": [entry | {"inputs": _freeze(entry["inputs"])} for entry in recorded],
    }
    temporary = directory / "run.json.tmp"
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(directory / "run.json")  # written last: a folder without it is not a recorded run
    return SweepResult(run_id, directory, report)


def assumptions(config: ProbeConfig) -> list[str]:
    """What a checkpoint does not record and the configuration says in its place."""
    update = config.update
    clipping = f"clipped at global norm {update.max_grad_norm:g}" if update.max_grad_norm else "not clipped"
    return [
        f"The step is that of the `{update.loss}` loss on {config.batch_config.B_U} prompts × {config.batch_config.G} "
        f"responses with the reward `{Path(update.reward).name}`, its gradient {clipping}; on-policy, without a "
        "KL term, cut responses included.",
        f"Responses are sampled at temperature {config.generation.temperature:g} without truncation of the law and "
        f"cut at {config.generation.max_new_tokens} tokens; the policy is computed in {config.policy.dtype}.",
    ]


def _freeze(value: Any) -> Any:
    """Inputs as JSON, artifacts as references."""
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
