"""The commands about recorded runs: which there are, what one of them says, and how several differ."""

import argparse
import textwrap
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

from flows.arguments import STORE, AddCommand, add_artifacts


def add_to(command: AddCommand) -> None:
    """Add the commands.

    Args:
        command: adds one, from its name, its help and what runs it.
    """
    add_artifacts(command("runs", "list the recorded runs: when, of what, and what a rerun changed", _runs))

    compared = command(
        "compare", "compare runs with the first: reruns of a sweep, or sweeps of training runs", _compare
    )
    compared.add_argument("run_ids", nargs="+", metavar="RUN", help="ids of two runs or more, or latest")
    compared.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="for the page, table and figure (default: in the store)"
    )
    add_artifacts(compared)

    shown = command("report", "print the results of a recorded run again, and say where its report is", _report)
    shown.add_argument("run_id", nargs="?", default="latest", metavar="RUN", help="its id (default: the last sweep)")
    shown.add_argument("--open", action="store_true", help="open report.html in the browser")
    add_artifacts(shown)


def _runs(options: argparse.Namespace) -> int:
    return list_runs(options.artifacts or STORE)


def _compare(options: argparse.Namespace) -> int:
    from entropy_core.pipeline.comparison import compare
    from entropy_core.store.store import Store
    from flows.results import comparison_table

    found = compare(Store(options.artifacts or STORE), options.run_ids, options.output)
    for paragraph in found.answers:
        print(f"{textwrap.fill(paragraph, 120)}\n")
    if found.rows:
        print(comparison_table(found.rows))
    print(f"\n{found.folder.absolute()}/")
    for path in sorted(found.folder.glob("compare.*")):
        print(f"    {path.name}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from flows.results import show

    return show(options.artifacts or STORE, options.run_id, options.open)


def list_runs(root: Path) -> int:
    """List the recorded runs, the last one last: when they finished, their parents, and what differs from those.

    Args:
        root: of the store.

    Returns:
        The exit status, 0.
    """
    from entropy_core.store import runs
    from flows.listing import print_table, print_unusable

    known = runs.recorded(root)
    rows = [_row(root, run_id) for run_id in known]
    print_table(("finished", "run", "rerun of", "what it is"), rows)
    print_unusable(root)
    where = f" in {root.absolute() / 'runs'}" if rows else f" in {root.absolute()}; `entropy-probe sweep` records one"
    print(f"{len(rows)} runs{where}")
    return 0


def _row(root: Path, run_id: str) -> tuple[str, str, str, str]:
    from entropy_core.store import runs

    parent = runs.rerun_of(root, run_id)
    with runs.understood(runs.folder(root, run_id) / runs.RECORD) as record:
        names = [entry["checkpoint"] for entry in record["checkpoints"]]
        shown = names if len(names) <= 2 else [names[0], "…", names[-1]]
        what = f"sweep of {' '.join(shown)} ({len(names)})"
        if parent:
            what = ", ".join(_changes(root, parent, record["config"])) or "nothing differs"
        finished = runs.finished(root, run_id).astimezone(UTC)
        return f"{finished:%Y-%m-%dT%H:%MZ}", run_id, parent or "–", what


def _changes(root: Path, parent: str, config: Any) -> Iterator[str]:
    from entropy_core.config.differences import differing_settings
    from entropy_core.store import runs

    if parent not in runs.recorded(root):
        yield "its parent is not recorded any more"
        return
    with runs.understood(runs.folder(root, parent) / runs.RECORD) as record:
        yield from map(str, differing_settings(record["config"], config))
