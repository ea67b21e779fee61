"""Compare recorded runs, checkpoint by checkpoint, from their cached batches: no stage runs, no vector is read."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_core.code.version import code_version
from entropy_core.config.differences import Differing, differing_settings, in_words
from entropy_core.errors import ConfigError, StoreError
from entropy_core.estimates.comparison import compared
from entropy_core.estimates.selection import Row, by_checkpoint, by_run_directory
from entropy_core.estimates.sides import Side
from entropy_core.estimates.tables import COMPARISON, to_table
from entropy_core.pipeline.final_stages import settings_of
from entropy_core.pipeline.recorded import read_run
from entropy_core.pipeline.runner import Inputs
from entropy_core.report import comparison as page
from entropy_core.report.frame import framed
from entropy_core.report.html import html
from entropy_core.report.recorded_run import RecordedRun
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact, artifacts_in
from entropy_core.store.store import Store


class _Run(NamedTuple):
    """A recorded run, and the checkpoints of each of its run directories."""

    provenance: Mapping[str, str]
    config: Mapping[str, Any]
    level: float
    series: Mapping[str, Sequence[Side]]


@dataclass(frozen=True)
class Comparison:
    """How runs differ. It shows its page in a notebook, and a paragraph on each run but the first in a terminal.

    Attributes:
        folder: with `compare.html`, `compare.md`, `compare.parquet`, `compare.png` and `compare.svg`.
        rows: of `compare.parquet`: a row per pair of checkpoints, normalisation and quantity.
        answers: the paragraphs.
    """

    folder: Path
    rows: list[Row]
    answers: list[str]

    def table(self) -> pa.Table:
        """Read the rows as a table whose metadata say what the columns mean and which runs they compare."""
        return pq.read_table(self.folder / "compare.parquet")

    def __repr__(self) -> str:
        return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in self.answers)

    def _repr_html_(self) -> str:
        return framed(self.folder.name, (self.folder / "compare.html").read_text(encoding="utf-8"))


def compare_runs(run: RecordedRun, *others: RecordedRun, folder: Path | str | None = None) -> Comparison:
    """Compare recorded runs with the first of them, or the run directories of one run with each other.

    Args:
        run: the one that the others are compared with.
        others: of the same store. None, if the checkpoints of `run` come from several run directories.
        folder: where to write the page, table and figure; None: a folder in the store.

    Returns:
        What differs, with intervals.

    Raises:
        StoreError: a run is of another store, or a part of it is gone.
        ConfigError: there are not two things to compare.
    """
    for other in others:
        if other.store.resolve() != run.store.resolve():
            raise StoreError(
                f"{other.id} is in {other.store.absolute()}, and {run.id} in {run.store.absolute()}",
                cause="the batches of both are read from one store",
                fix="bring it over: `entropy-probe store export RUN FILE --all`, then `store import FILE`",
            )
    ids = [run.id, *(other.id for other in others)]
    return compare(Store(run.store), ids, None if folder is None else Path(folder))


def compare(store: Store, run_ids: Sequence[str], folder: Path | None = None) -> Comparison:
    """Compare recorded runs with the first of them, and the run directories of a run with its first.

    Args:
        store: where the runs are.
        run_ids: two or more; or one whose checkpoints come from several run directories.
        folder: where to write the files of a `Comparison`, made if needed; None: `comparisons/RUN--RUN` in the store.

    Returns:
        What is in these files, and in words.

    Raises:
        StoreError: a run does not exist, or a part of it is gone.
        ConfigError: there are not two things to compare.
    """
    from entropy_core.report.comparison_figure import comparison_figure  # here: so that others load no plotting library
    from entropy_core.report.figures import save_figure

    named = list(dict.fromkeys(runs.find(store.root, run_id).name for run_id in run_ids))
    with store.in_use():
        found = [_read(store, run_id) for run_id in named]
        series = {name: sides for one in found for name, sides in _series(one, len(found)).items()}
        if len(series) < 2:
            raise ConfigError(
                f"there is nothing to compare {named[0]} with",
                cause="one run was given, and its checkpoints are of one run directory",
                fix="give the ids of two runs or more; `entropy-probe runs` lists them",
            )
        first, *others = series.values()
        for other in others:
            _require_common_normalization(first[0], other[0])
        rows = [row for other in others for pair in _pairs(first, other) for row in compared(*pair, found[0].level)]
    differing = [differing_settings(found[0].config, one.config) for one in found]
    changes = {
        name: [str(setting) for setting in of_run if setting.key != "checkpoints"]
        for one, of_run in zip(found, differing, strict=True)
        for name in _series(one, len(found))
    }
    settings = _in_one_table(differing)
    text = page.markdown(rows, changes, settings, [one.provenance for one in found])
    folder = folder or store.root / "comparisons" / "--".join(named)[:200]
    folder.mkdir(parents=True, exist_ok=True)
    table = to_table(rows, COMPARISON).replace_schema_metadata({"runs": " ".join(named), "code": code_version()})
    pq.write_table(table, folder / "compare.parquet")
    drawn = {name: [row for side in sides for row in side.rows] for name, sides in series.items()}
    save_figure(comparison_figure(drawn, rows), folder / "compare.png", folder / "compare.svg")
    (folder / "compare.md").write_text(text, encoding="utf-8")
    shared = html(" and ".join(named), text, {"compare": (folder / "compare.svg").read_bytes()})
    (folder / "compare.html").write_text(shared, encoding="utf-8")
    return Comparison(folder, rows, page.answers(rows, changes))


def _read(store: Store, run_id: str) -> _Run:
    directory, config, recorded = read_run(store, run_id)
    table = RecordedRun(store.root, directory.name).results()
    provenance = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    recorded_of = {entry["checkpoint"]: entry for entry in recorded}
    series: dict[str, list[Side]] = {}
    for of_directory, rows in by_run_directory(table.to_pylist()).items():
        for name, of_checkpoint in by_checkpoint(rows).items():
            entry = recorded_of[name]
            side = Side(
                run="",
                checkpoint=name,
                step=entry["step"],
                inputs=entry["inputs"],
                settings=settings_of(config),
                rows=of_checkpoint,
                pools=(_pool(store, entry["inputs"]["scores"]), _pool(store, entry["inputs"]["scores_u"])),
            )
            series.setdefault(of_directory, []).append(side)
    document = config.model_dump(mode="json")
    return _Run({"run": directory.name, **provenance}, document, config.variance.confidence_level, series)


def _pool(store: Store, scores: Inputs | Sequence[Artifact]) -> str:
    """The digest of the prompts that a batch was drawn from; empty where the store does not have them any more."""
    names = {(shard.stage, shard.key) for shard in artifacts_in(scores)}
    pools = {key for stage, key in runs.with_upstream(store, names) if stage == "load-prompts"}
    digests = {store.manifest("load-prompts", key).get("digest", "") for key in pools}
    return digests.pop() if len(digests) == 1 else ""


def _series(one: _Run, runs_compared: int) -> dict[str, list[Side]]:
    """The series of a run, by the shortest name that tells them apart."""
    run, named = one.provenance["run"], {}
    for directory, sides in one.series.items():
        name = run if len(one.series) == 1 else directory if runs_compared == 1 else f"{run} {directory}"
        named[name] = [replace(side, run=name) for side in sides]
    return named


def _require_common_normalization(first: Side, other: Side) -> None:
    of_first, of_other = first.settings["normalizations"], other.settings["normalizations"]
    if not set(of_first) & set(of_other):
        raise ConfigError(
            f"{first.run} has entropies {' and '.join(of_first)}, and {other.run} {' and '.join(of_other)}",
            fix=f"`entropy-probe variance RUN --normalizations {of_first[0]}` computes the others",
        )


def _pairs(first: Sequence[Side], other: Sequence[Side]) -> Iterator[tuple[Side, Side]]:
    """The checkpoints of one step in both."""
    by_step = {side.step: side for side in other}
    yield from ((side, by_step[side.step]) for side in first if side.step in by_step)


def _in_one_table(differing: Sequence[Sequence[Differing]]) -> dict[str, list[str]]:
    """By key the values of a setting in all runs, for the settings in which one of them differs from the first."""
    table = {one.key: [in_words(one.before)] * len(differing) for one in chain(*differing)}
    for number, of_run in enumerate(differing):
        for one in of_run:
            table[one.key][number] = in_words(one.after)
    return table
