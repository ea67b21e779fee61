"""What Prefect's UI shows of a run beside its states: its plan, how far it is, tables of results, the report."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from entropy_core.pipeline.plan import Cost, Step
from entropy_core.pipeline.statistics import SweepResult
from entropy_core.report.headline import headline, selected
from entropy_core.report.interventions import deepest
from flows.numbers import numbers_of_each
from flows.plan import plan_table, plan_total
from flows.results import INTERVENTIONS, inline_figures
from tasks.events import checkpoint_probed

_SECONDS_BETWEEN_UPDATES = 2.0


def published_progress() -> Callable[[str, float], None]:
    """Make what `Progress` tells: a line goes to the log, and how much is done to an artifact of the run."""
    artifact = create_progress_artifact(0.0, key="progress", description="begins")
    assert isinstance(artifact, UUID)  # and not a coroutine: flows are not asynchronous here

    told = -math.inf

    def tell(line: str, done: float) -> None:
        nonlocal told
        get_run_logger().info(line)
        if done == 1 or time.monotonic() - told >= _SECONDS_BETWEEN_UPDATES:  # each asks the server
            update_progress_artifact(artifact, 100.0 * done, description=line)
            told = time.monotonic()

    return tell


def publish_plan(steps: Sequence[Step], costs: Mapping[str, Cost]) -> None:
    """Show in the UI what a sweep is about to compute, and why.

    Args:
        steps: of the plan.
        costs: by stage, of earlier runs.
    """
    line = plan_total(steps, costs)
    get_run_logger().info(line)
    create_table_artifact(plan_table(steps, costs), key="plan", description=line)


def announce(result: SweepResult, run: str) -> None:
    """Send an event for each checkpoint of a sweep, for the automations of the server.

    Args:
        result: of the pipeline.
        run: name of the run.
    """
    for numbers in numbers_of_each(result.report.table("results.parquet").to_pylist()):
        checkpoint_probed(run, numbers, str(runtime.flow_run.id or ""))


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
    if "interventions.parquet" in report.manifest["files"]:
        changes = report.table("interventions.parquet").to_pylist()
        for checkpoint in dict.fromkeys(row["checkpoint"] for row in changes):
            ranked = deepest([row for row in changes if row["checkpoint"] == checkpoint])
            about = f"{checkpoint}: what would change it. All columns: `{folder}/interventions.parquet`"
            cells = selected(ranked, ("normalization", *INTERVENTIONS))
            create_table_artifact(cells, key=f"interventions-{_slug(checkpoint)}", description=about)
    page = inline_figures((folder / "report.md").read_text(encoding="utf-8"), report.path)
    create_markdown_artifact(page, key="report", description=f"Files: `{folder}`")
    (folder / "flow-run.txt").write_text(f"{runtime.flow_run.ui_url}\n", encoding="utf-8")


def _slug(name: str) -> str:
    """A name as the keys of Prefect's artifacts may be: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
