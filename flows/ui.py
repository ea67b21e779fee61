"""What Prefect's UI shows of a run beside its states: how far it is, the table of results, the report with figures."""

import resource
import sys
import time
from collections import Counter
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from entropy_core.artifact import Artifact
from entropy_core.stages.measure import Inputs, Runner
from entropy_core.stages.pipeline import SweepResult
from entropy_core.store import Stage
from flows.results import headline, inline_figures

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Keeps a progress artifact up to date, and says in the log now and then how far a run is.

    Args:
        expected: stage name → number of runs.
    """

    def __init__(self, expected: Counter[str]) -> None:
        self._left = expected.copy()
        self._total, self._done = expected.total(), 0
        self._latest: dict[str, float] = {}  # seconds that the last run of each stage took
        self._current = ""
        self._started = self._said = time.monotonic()
        artifact = create_progress_artifact(0.0, key="progress", description=f"0 of {self._total} stages")
        assert isinstance(artifact, UUID)  # and not a coroutine: flows are not asynchronous here
        self._artifact = artifact

    def watched(self, run: Runner) -> Runner:
        """Make a runner that does what `run` does and counts."""

        def watched_run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
            self._current = f"{stage.name} · {label}"
            started = time.monotonic()
            artifact = run(stage, inputs, label)
            self._latest[stage.name] = time.monotonic() - started
            self._left -= Counter({stage.name: 1})
            self._done += 1
            self._say(f"{self._done} of {self._total} stages, {self._pace()}")
            return artifact

        return watched_run

    def within(self, done: int, total: int) -> None:
        """Note that the stage under way has done `done` of its `total` parts."""
        if done < total:
            self._say(f"{self._current}: {done} of {total}")

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._said = now
            get_run_logger().info(line)
            update_progress_artifact(self._artifact, 100.0 * self._done / self._total, description=line)

    def _pace(self) -> str:
        elapsed = time.monotonic() - self._started
        if not self._left:
            return f"in {_duration(elapsed)}, with at most {_peak_gigabytes():.1f} GB of memory"
        per_minute = 60 * self._done / elapsed
        typical = sum(self._latest.values()) / len(self._latest)
        seconds = sum(count * self._latest.get(name, typical) for name, count in self._left.items())
        return f"{per_minute:.{0 if per_minute > 10 else 1}f} a minute, about {_duration(seconds)} left"


def publish(result: SweepResult) -> None:
    """Show a sweep's results in the UI.

    Args:
        result: of the pipeline.
    """
    report = result.report
    rows = headline(report.table("results.parquet").to_pylist())
    create_table_artifact(rows, key="results", description=f"All columns: `{result.run_directory}/results.parquet`")
    page = inline_figures(report.path("report.md").read_text(encoding="utf-8"), report.path)
    create_markdown_artifact(f"{page}\n\nFiles: `{result.run_directory}`\n", key="report")


def _peak_gigabytes() -> float:
    """The most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e9 / 1024)  # in bytes there, in KiB elsewhere


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
