"""What Prefect's UI shows of a run beside its states: its plan, how far it is, tables of results, the report."""

import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import mean
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from entropy_core.artifact import Artifact
from entropy_core.manifest import peak_rss_bytes
from entropy_core.stages.measure import Inputs, Runner
from entropy_core.stages.pipeline import SweepResult
from entropy_core.stages.plan import Cost, Step
from entropy_core.store import Stage
from flows.plan import plan_table, plan_total
from flows.results import duration, headline, inline_figures

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Keeps a progress artifact up to date, and says in the log now and then how far a run is.

    Args:
        steps: of the plan, which the sweep takes in this order.
        costs: by stage, of earlier runs.
    """

    def __init__(self, steps: Sequence[Step], costs: Mapping[str, Cost]) -> None:
        self._left = deque(steps)
        self._total, self._done = len(steps), 0
        self._seconds = {stage: cost.seconds for stage, cost in costs.items()}  # then what the last run of each took
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
            if not self._left.popleft().cached:
                self._seconds[stage.name] = time.monotonic() - started
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
            return f"in {duration(elapsed)}, with at most {peak_rss_bytes() / 1e9:.1f} GB of memory"
        per_minute = 60 * self._done / elapsed
        to_run = [step.stage for step in self._left if not step.cached]
        typical = mean(self._seconds.values()) if self._seconds else elapsed / self._done
        seconds = sum(self._seconds.get(stage, typical) for stage in to_run)
        return f"{per_minute:.{0 if per_minute > 10 else 1}f} a minute, about {duration(seconds)} left"


def publish_plan(steps: Sequence[Step], costs: Mapping[str, Cost]) -> None:
    """Show in the UI what a sweep is about to compute, and why.

    Args:
        steps: of the plan.
        costs: by stage, of earlier runs.
    """
    line = plan_total(steps, costs)
    get_run_logger().info(line)
    create_table_artifact(plan_table(steps, costs), key="plan", description=line)


def publish(result: SweepResult) -> None:
    """Show a sweep's results in the UI: a table for each checkpoint, and the report with its figures.

    The run is known by its folder, and the folder by its run: `flow-run.txt` in it has the address.

    Args:
        result: of the pipeline.
    """
    report, folder = result.report, result.run_directory
    rows = headline(report.table("results.parquet").to_pylist())
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        of_checkpoint = [row for row in rows if row["checkpoint"] == checkpoint]
        about = f"{checkpoint}. All columns: `{folder}/results.parquet`"
        create_table_artifact(of_checkpoint, key=f"results-{_slug(checkpoint)}", description=about)
    page = inline_figures(report.path("report.md").read_text(encoding="utf-8"), report.path)
    create_markdown_artifact(page, key="report", description=f"Files: `{folder}`")
    (folder / "flow-run.txt").write_text(f"{runtime.flow_run.ui_url}\n", encoding="utf-8")


def _slug(name: str) -> str:
    """A name as the keys of Prefect's artifacts may be: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
