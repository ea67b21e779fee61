"""What Prefect's UI shows of a run beside its states: its name and tags, its plan, how far it is, and its results.

The summary is the one artifact of the run itself, and the others are artifacts of two task runs: so it stands alone at
the end of the run's graph, and first among the run's artifacts, whose order Prefect leaves to chance.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from prefect import Task, get_client, get_run_logger, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from entropy_core.pipeline.plan import Cost, Step
from entropy_core.pipeline.statistics import SweepResult
from entropy_core.report.recorded_run import RecordedRun
from flows.numbers import numbers_of_each
from flows.plan import plan_table, plan_total
from flows.results import inline_figures
from flows.ui_tables import answer, intervention_cells, plan_cells, result_cells, summary_page
from tasks.events import checkpoint_probed

_SECONDS_BETWEEN_UPDATES = 2.0
_MADE_UP = re.compile("[a-z0-9]+(-[a-z0-9]+){1,3}")
"""How a run is called by Prefect if its user did not name it: `hasty-nuthatch`, `alpha-ursae-majoris`."""
_MOST_TAGS = 5
"""Checkpoints that are tags; of more, their number is one."""
_Result = TypeVar("_Result")


def introduce(kind: str, of: str, checkpoints: Sequence[str] = ()) -> None:
    """Name the run after what it is, unless its user has named it, and tag it.

    Args:
        kind: sweep, variance or interventions.
        of: name of the configuration, or the id of the recorded run.
        checkpoints: their names.
    """
    listed = ", ".join(checkpoints)
    if len(checkpoints) > 2:
        listed = f"{checkpoints[0]} … {checkpoints[-1]} ({len(checkpoints)})"
    name = " · ".join(filter(None, [of, kind if kind != "sweep" else "", listed]))
    tags = {kind, of, *(checkpoints if len(checkpoints) <= _MOST_TAGS else [f"{len(checkpoints)} checkpoints"])}
    with get_client(sync_client=True) as client:
        run = UUID(str(runtime.flow_run.id))
        its_own = not _MADE_UP.fullmatch(str(runtime.flow_run.name))
        client.update_flow_run(run, name=str(runtime.flow_run.name) if its_own else name, tags=sorted(tags))


def in_a_task(name: str, show: Callable[[], _Result]) -> _Result:
    """Call `show` as a task run, which then has the artifacts that it makes."""
    return Task(lambda: show(), name=name, task_run_name=name, cache_policy=NO_CACHE)()


def published_progress(name: str) -> Callable[[str, float], None]:
    """Make what `Progress` tells: a line goes to the log, and how much is done to an artifact of the run.

    Args:
        name: of the configuration.
    """
    artifact = create_progress_artifact(0.0, key=f"{_slug(name)}-progress", description="begins")
    assert isinstance(artifact, UUID)  # and not a coroutine: flows are not asynchronous here

    told = -math.inf

    def tell(line: str, done: float) -> None:
        nonlocal told
        get_run_logger().info(line)
        if done == 1 or time.monotonic() - told >= _SECONDS_BETWEEN_UPDATES:  # each asks the server
            update_progress_artifact(artifact, 100.0 * done, description=line)
            told = time.monotonic()

    return tell


def publish_plan(name: str, steps: Sequence[Step], costs: Mapping[str, Cost]) -> Callable[[str, float], None]:
    """Show in the UI what a sweep is about to compute, and why.

    Args:
        name: of the configuration.
        steps: of the plan.
        costs: by stage, of earlier runs.

    Returns:
        What is to be told of the sweep's progress; see `published_progress`.
    """
    line = plan_total(steps, costs)
    get_run_logger().info(line)

    def show() -> Callable[[str, float], None]:
        cells = plan_cells(plan_table(steps, costs))
        create_table_artifact(cells, key=f"{_slug(name)}-plan", description=line)
        return published_progress(name)

    return in_a_task("plan", show)


def announce(result: SweepResult, run: str) -> None:
    """Send an event for each checkpoint of a sweep, for the automations of the server.

    Args:
        result: of the pipeline.
        run: name of the run.
    """
    for numbers in numbers_of_each(result.report.table("results.parquet").to_pylist()):
        checkpoint_probed(run, numbers, str(runtime.flow_run.id or ""))


def publish(result: SweepResult) -> None:
    """Show a sweep's results in the UI: the summary, a table for each checkpoint, and the report with its figures.

    The run is known by its folder, and the folder by its run: `flow-run.txt` in it has the address.

    Args:
        result: of the pipeline.
    """
    folder = result.run_directory
    run = RecordedRun(folder.parents[1], folder.name)
    name = _slug(run.config["name"])
    tables = [(f"{name}-report", "the report with its figures"), *_tables(name, run)]
    create_markdown_artifact(summary_page(run, tables), key=f"{name}-summary", description=answer(run))
    in_a_task("results", partial(_publish_tables, name, run, result))
    (folder / "flow-run.txt").write_text(
        f"{runtime.flow_run.ui_url}\nThe page of the run in Prefect's UI, while `entropy-probe ui` is up for this "
        "store.\n",
        encoding="utf-8",
    )


def _tables(name: str, run: RecordedRun) -> list[tuple[str, str]]:
    """The keys of the tables, and what each shows."""
    tried = list(dict.fromkeys(row["checkpoint"] for row in run.rows("interventions")))
    of_results = [(f"{name}-results-{_slug(one)}", f"every step size at {one}") for one in run.checkpoints]
    return of_results + [(f"{name}-interventions-{_slug(one)}", f"what would change {one}") for one in tried]


def _publish_tables(name: str, run: RecordedRun, result: SweepResult) -> None:
    folder = result.run_directory
    for table, cells in (("results", result_cells), ("interventions", intervention_cells)):
        rows = run.rows(table)
        for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
            of = [row for row in rows if row["checkpoint"] == checkpoint]
            about = f"{checkpoint}, {of[0]['normalization']}. All columns: `{Path(folder) / table}.parquet`"
            create_table_artifact(cells(of), key=f"{name}-{table}-{_slug(checkpoint)}", description=about)
    page = inline_figures((folder / "report.md").read_text(encoding="utf-8"), result.report.path)
    create_markdown_artifact(page, key=f"{name}-report", description=f"Files: `{folder}`")


def _slug(name: str) -> str:
    """A name as the keys of Prefect's artifacts may be: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "probe"
