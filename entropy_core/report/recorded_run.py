"""A recorded run as Python sees it: its tables, the tokens of U, and its report in a notebook."""

import textwrap
from datetime import UTC
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_core.errors import StoreError, one_line
from entropy_core.report.agreement import disagreements
from entropy_core.report.answer import answer
from entropy_core.report.evaluation_batch import invalid_over_e
from entropy_core.report.frame import framed
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact

if TYPE_CHECKING:
    import pyarrow


class RecordedRun:
    """What a sweep, or a rerun of one, has left in a store. It reads its files when they are asked for.

    Attributes:
        id: of the run.
        store: the folder of the store that it is in.
        directory: its folder.
        finished: when it was recorded.
        rerun_of: the id of the run that it is a rerun of; empty for a sweep.
        config: its configuration, as plain values.
        checkpoints: names of the checkpoints, by step.
        warnings: what is to be known before its numbers are read.
    """

    def __init__(self, root: Path, run_id: str) -> None:
        self.directory = runs.find(root, run_id)
        self.store = root
        with runs.understood(self.directory / runs.RECORD) as record:
            self.id: str = self.directory.name
            self.rerun_of = runs.rerun_of(root, self.id)
            self.finished = runs.finished(root, self.id).astimezone(UTC)
            self.config: dict[str, Any] = record["config"]
            self._tokens_of = {}
            for entry in record["checkpoints"]:
                [self._tokens_of[entry["checkpoint"]]] = runs.references(entry["inputs"]["first_order_u"])
            of_each = [entry["warnings"] for entry in record["checkpoints"]]
            self._warnings = list(dict.fromkeys(warning for of_one in of_each for warning in of_one))
        self.checkpoints = list(self._tokens_of)

    def table(self, name: str) -> "pyarrow.Table":
        """Read one of the run's tables, such as "linearity", "replicates", "predictors" or "agreement".

        Args:
            name: of the Parquet file, without its suffix; docs/columns.md lists them.

        Returns:
            The table; unit and description of a column are in the metadata of its field, and those of the schema say
            where the numbers come from.

        Raises:
            StoreError: the run has no such table, or it cannot be read.
        """
        import pyarrow.parquet

        path = self.directory / f"{name}.parquet"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in self.directory.glob("*.parquet")))
            raise StoreError(f"the run {self.id} has no table {name!r}", fix=f"use one of {there}")
        try:
            return pyarrow.parquet.ParquetFile(path).read()
        except (OSError, pyarrow.ArrowException) as error:
            raise StoreError(
                f"the table {path} cannot be read: {one_line(error)}",
                cause="it was edited or damaged",
                fix=f"`entropy-probe variance {self.id}` writes it anew",
            ) from None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table; none where the run has no such table."""
        there = (self.directory / f"{name}.parquet").is_file()
        return self.table(name).to_pylist() if there else []

    def results(self) -> "pyarrow.Table":
        """Read the result table: a row per checkpoint, step size, normalisation and estimator."""
        return self.table("results")

    def tokens(self, checkpoint: str = "") -> "pyarrow.Table":
        """Read the tokens of the update batch U, each with its share in the change of the entropy.

        Args:
            checkpoint: name of a checkpoint; empty for the last one.

        Returns:
            A row per token of U, in order.

        Raises:
            StoreError: the run has no such checkpoint, or the tokens are not in the store any more.
        """
        wanted = checkpoint or self.checkpoints[-1]
        if wanted not in self._tokens_of:
            there = ", ".join(self.checkpoints)
            raise StoreError(f"the run {self.id} has no checkpoint {checkpoint!r}", fix=f"use one of {there}")
        return Artifact.from_dict(self._tokens_of[wanted], self.store).table("tokens.parquet")

    @property
    def warnings(self) -> list[str]:
        """What is to be known before the numbers are read, one sentence each."""
        return [*invalid_over_e(self.rows("results")), *disagreements(self.rows("agreement")), *self._warnings]

    @property
    def answer(self) -> str:
        """The first paragraph of the report: is the entropy falling, how fast, why, and does the prediction hold."""
        tables = [self.rows(name) for name in ("results", "price", "interventions", "phase", "rehearsal")]
        first = tables[0][0]["normalization"]
        shown, *others = ([row for row in rows if row["normalization"] == first] for rows in tables)
        return answer(shown, bool(disagreements(self.rows("agreement"))), *others)

    def __repr__(self) -> str:
        parent = f", a rerun of {self.rerun_of}" if self.rerun_of else ""
        title = f"{self.id}, recorded at {self.finished:%Y-%m-%d %H:%M} UTC{parent}"
        paragraphs = [title, *(f"WARNING: {warning}" for warning in self.warnings), self.answer]
        return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs)

    def _repr_html_(self) -> str:
        """The report, in a frame of its own: neither its style nor its script can reach the notebook."""
        page = self.directory / "report.html"
        if not page.is_file():
            return f"<pre>{escape(repr(self))}</pre>"
        return framed(self.id, page.read_text(encoding="utf-8"))


def load_run(run_id: str = "latest", store: Path | str = "artifacts") -> RecordedRun:
    """Open a recorded run.

    Args:
        run_id: of the run; `latest` is the sweep that finished last.
        store: folder of the store.

    Returns:
        The run, which shows its report in a notebook and the answer of the sweep in a terminal.

    Raises:
        StoreError: there is no such run, or its record cannot be used.
    """
    return RecordedRun(Path(store), run_id)


def recorded_runs(store: Path | str = "artifacts") -> list[str]:
    """List the ids of the recorded runs, in the order in which they finished.

    Args:
        store: folder of the store.
    """
    return runs.recorded(Path(store))
