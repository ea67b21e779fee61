"""Plan a sweep: find which stages would run, why, and at what cost, without computing anything."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.sweep import Promised, go_through
from entropy_core.store import vectors
from entropy_core.store.artifact import Artifact, upstream
from entropy_core.store.explain import nearest, recipe
from entropy_core.store.store import Stage, Store


class Step(NamedTuple):
    """One run of a stage in a sweep."""

    stage: str
    label: str
    cached: bool
    reasons: tuple[str, ...]  # why the step is not cached


def plan(config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe], store: Store) -> list[Step]:
    """Tell for every run of a stage whether it is cached, and if not, why.

    Args:
        config: configuration of the sweep.
        checkpoints: checkpoints from `preflight`.
        store: the store of the artifacts; only read, without verifying data files.

    Returns:
        The steps in the order of the sweep.
    """
    steps: list[Step] = []
    step_of: dict[Artifact, int] = {}  # index of the step of each cached artifact

    def look(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        awaited = dict.fromkeys(one["stage"] for one in upstream(inputs) if not one["digest"])
        key = "" if awaited else store.key(stage, inputs)
        manifest = store.manifest(stage.name, key) if key else {}
        reasons = [f"{', '.join(awaited)} would run"] if awaited else []
        if key and not manifest:
            reasons = _reasons(store, stage, key, inputs)
        for opened in () if manifest else stage.opened(inputs):  # missing vectors are recomputed by `VectorKeeper`
            if opened in step_of and not vectors.present(opened):
                index, why = step_of.pop(opened), f"its vectors are not in the store, and {stage.name} would run"
                steps[index] = steps[index]._replace(cached=False, reasons=(why,))
        steps.append(Step(stage.name, label, bool(manifest), tuple(reasons)))
        if not manifest:
            return Promised(stage.name, "", "", Path())
        artifact = Artifact(stage.name, key, manifest["digest"], store.root)
        step_of[artifact] = len(steps) - 1
        return artifact

    go_through(config, checkpoints, look)
    return steps


class Cost(NamedTuple):
    """Cost of one run of a stage."""

    seconds: float
    bytes: float


def typical_costs(store: Store) -> dict[str, Cost]:
    """Return the median cost of each stage over its artifacts in the store, by stage."""
    found: dict[str, list[tuple[float, int]]] = {}
    for artifact in store.ls():
        manifest = artifact.manifest
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        found.setdefault(artifact.stage, []).append((manifest["wall_seconds"], size))
    return {stage: Cost(*map(median, zip(*of_stage, strict=True))) for stage, of_stage in found.items()}


def _reasons(store: Store, stage: Stage, key: str, inputs: Inputs) -> list[str]:
    if (store.root / stage.name / key).exists():
        return [f"{stage.name}/{key} is there, but unsound"]
    found = nearest(store, recipe(stage, inputs))
    return list(map(str, found[1])) if found else ["it was never computed in this store"]


def summarize(steps: Iterable[Step]) -> list[str]:
    """Format a plan for display: per stage, how many runs are cached, how many would run, and why."""
    by_stage: dict[str, list[Step]] = {}
    for step in steps:
        by_stage.setdefault(step.stage, []).append(step)
    lines = []
    for stage, of_stage in by_stage.items():
        cached = sum(step.cached for step in of_stage)
        lines.append(f"{stage:20} {cached:5} cached {len(of_stage) - cached:5} would run")
        reasons = list(dict.fromkeys(reason for step in of_stage for reason in step.reasons))
        lines += [f"    {reason}" for reason in reasons[:MOST]]
        if len(reasons) > MOST:
            lines.append(f"    and {len(reasons) - MOST} more reasons")
    return lines


MOST = 8
"""Maximum number of reasons listed per stage."""
