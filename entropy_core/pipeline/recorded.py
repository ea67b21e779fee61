"""What run.json says of a sweep: written when it ends, and read back when its statistics are run again."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from entropy_core.code.version import code_version
from entropy_core.config import plain_yaml
from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import StoreError
from entropy_core.pipeline.final_stages import AGREEMENT, ASKED_FOR, VARIANCE, compared, settings_of
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.stored_code import require_no_stored_code
from entropy_core.report.provenance import Provenance, write_stamped
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact
from entropy_core.store.inputs import require_inputs
from entropy_core.store.store import Store

RECORD_FORMAT = 6
"""Format version of run.json, incremented when the inputs of the variance stage or the recorded data change."""

WITH_ARTIFACTS = ("inputs", *ASKED_FOR)
"""What is recorded of a checkpoint as inputs of later stages."""


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Setting(_Form):
    key: str
    value: Any
    source: str


class _Checkpoint(_Form):
    checkpoint: str
    step: int
    inputs: dict[str, Any]
    price: dict[str, Any] = {}
    interventions: dict[str, Any] = {}
    phase: dict[str, Any] = {}
    rehearsal: dict[str, Any] = {}
    post_mortem: dict[str, Any] = {}
    notes: list[str]
    settings: list[_Setting]
    warnings: list[str]
    log: dict[str, Any]


class _Record(_Form):
    format: int
    run_id: str
    finished: str
    rerun_of: str
    config: dict[str, Any]
    report: dict[str, Any]
    checkpoints: Annotated[list[_Checkpoint], Field(min_length=1)]


def write_run(
    store: Store,
    run_id: str,
    config: ProbeConfig,
    checkpoints: Sequence[Inputs],
    report: Artifact,
    rerun_of: str = "",
) -> Path:
    """Write the folder of a run: the files of its report, its configuration, and the record, signed if there is a key.

    A rerun that comes out as a run that is recorded already leaves it what it is: its date, and what it is a rerun of.

    Args:
        store: the store of the artifacts.
        run_id: ID of the run.
        config: configuration of the sweep.
        checkpoints: for each checkpoint its name, step, log, notes, settings, warnings, the inputs of its variance
            stage, and those of the stages in `ASKED_FOR` that are recorded for them alone, which may be empty.
        report: artifact of the report stage.
        rerun_of: the run whose statistics or interventions these are; empty for a sweep.

    Returns:
        The folder.
    """
    document = config.model_dump(mode="json")
    finished = datetime.now(UTC)
    if rerun_of and run_id in runs.recorded(store.root):
        finished, rerun_of = runs.finished(store.root, run_id), runs.rerun_of(store.root, run_id)
    record = {
        "format": RECORD_FORMAT,
        "run_id": run_id,
        "finished": finished.isoformat(),
        "rerun_of": rerun_of,
        "config": document,
        "report": report.to_dict(),
        "checkpoints": [entry | {of: _freeze(entry[of]) for of in WITH_ARTIFACTS} for entry in checkpoints],
    }
    provenance = _provenance(record, config)
    with runs.writing(store, run_id) as folder:
        for file in report.manifest["files"]:
            write_stamped(report.path(file), folder / file, provenance)
        (folder / "config.yaml").write_text(plain_yaml.dump(document), encoding="utf-8")
        runs.write(folder, record)
    return runs.folder(store.root, run_id)


def _provenance(record: Mapping[str, Any], config: ProbeConfig) -> Provenance:
    batch, settings = config.batch_config, config.variance
    seeds_e = range(batch.E_batch_seed, batch.E_batch_seed + batch.E_replicates)
    return {
        "run": record["run_id"],
        "rerun_of": record["rerun_of"],
        "date": record["finished"],
        "code": code_version(),
        "config": config.name,
        "baseline": settings.baseline,
        "cluster": f"{settings.cluster}: {config.units_of_e}s",
        "confidence_level": f"{settings.confidence_level:g}",
        "seed_e": ", ".join(map(str, seeds_e)),
        "seed_u": str(batch.U_batch_seed),
    }


def read_run(store: Store, run_id: str) -> tuple[Path, ProbeConfig, list[Inputs]]:
    """Read what `write_run` wrote. The record may have been edited, so everything in it is checked.

    Args:
        store: the store of the artifacts.
        run_id: ID of the run; `latest` is the sweep that finished last.

    Returns:
        The folder of the run, its configuration, and what was recorded for each checkpoint.

    Raises:
        StoreError: the run does not exist, another version recorded it, or its record was edited or damaged.
        ConfigError: its configuration has an error.
    """
    directory = runs.find(store.root, run_id)
    with runs.understood(directory / runs.RECORD) as record:
        if record.get("format") != RECORD_FORMAT:
            raise StoreError(
                f"run {directory.name} was recorded in format {record.get('format')}, and this is {RECORD_FORMAT}",
                cause="another version of entropy-probe recorded it",
                fix=f"`entropy-probe sweep {directory / 'config.yaml'}`: what is cached is reused",
            )
        _require_form(record)
        config = parse_config(record["config"], str(directory / runs.RECORD))
        runs.named(store.root, directory.name)  # refuses references to anything but artifacts
        checkpoints = [
            entry | {of: _revive(entry.get(of, {}), store) for of in WITH_ARTIFACTS} for entry in record["checkpoints"]
        ]
        for entry in checkpoints:
            require_inputs(VARIANCE, entry["inputs"] | settings_of(config))
            for of, (stage, inputs_of) in ASKED_FOR.items():
                if entry[of]:
                    require_inputs(stage, inputs_of(entry, config))
        require_inputs(AGREEMENT, compared(checkpoints, config))
    return directory, config, checkpoints


def with_interventions(request: InterventionsRequest) -> tuple[ProbeConfig, str]:
    """Return the configuration of a recorded sweep with the interventions that are asked for, and the id of the run.

    Args:
        request: which sweep, which interventions.

    Returns:
        The configuration of a sweep that finds all but the interventions computed, and what it is a rerun of.

    Raises:
        StoreError, ConfigError: as `read_run` and `require_no_stored_code`.
    """
    store = Store(request.artifacts)
    directory, config, _ = read_run(store, request.run)
    require_no_stored_code(config, store.root)
    execution = config.execution.model_copy(update={"artifacts": request.artifacts})
    asked = {"interventions": request.interventions, "lab": request.lab, "execution": execution}
    return config.model_copy(update=asked), directory.name


def _require_form(record: Any) -> None:
    """Raises ValueError if an entry of a record is missing, unknown or of the wrong type; names it."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _freeze(value: Any) -> Any:
    """Convert inputs to JSON, with artifacts as references."""
    if isinstance(value, Artifact):
        return {"artifact": value.to_dict()}
    if isinstance(value, Mapping):
        return {key: _freeze(item) for key, item in value.items()}
    return [_freeze(item) for item in value] if isinstance(value, list | tuple) else value


def _revive(value: Any, store: Store) -> Any:
    """Convert JSON to inputs, with references as artifacts."""
    if isinstance(value, Mapping):
        if set(value) == {"artifact"}:
            return Artifact.from_dict(value["artifact"], store.root)
        return {key: _revive(item, store) for key, item in value.items()}
    return [_revive(item, store) for item in value] if isinstance(value, list) else value
