"""How the results of a sweep are shown: in the terminal, and in Prefect's UI, whose tables do not round."""

import base64
import re
import textwrap
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from entropy_core.errors import ProbeError, StoreError, one_line
from entropy_core.estimates.agreement import independent
from entropy_core.report.headline import HEADLINE, headline, rounded
from entropy_core.report.interventions import deepest
from entropy_core.report.recorded_run import RecordedRun
from entropy_core.report.verdict_lines import order_sentences
from entropy_core.store import runs

INTERVENTIONS = ("checkpoint", "intervention", "delta_h1", "difference", "low", "high", "p_holm", "verdict")
"""Columns of interventions.parquet that a reader looks at first."""
COMPARISON = (
    *("step", "quantity", "other_run", "value", "other_value", "difference", "difference_se"),
    *("this_update_low", "this_update_high", "verdict"),
)
"""Columns of compare.parquet that a reader looks at first."""
_VIEW = ("normalization", "estimator")  # what the terminal shows one choice of


def terminal_table(rows: list[dict[str, Any]]) -> str:
    """Lay the first normalisation and estimator out as text.

    Args:
        rows: of results.parquet, at least one.

    Returns:
        A table with aligned columns, and a line that says what it shows.
    """
    choice = {name: rows[0][name] for name in _VIEW}
    shown = [row for row in headline(rows) if all(row[name] == value for name, value in choice.items())]
    columns = [name for name in HEADLINE if name not in choice]
    lines = [columns, *([_text(row[name]) for name in columns] for row in shown)]
    return "\n".join([*aligned(lines), f"({', '.join(choice.values())}; {len(shown)} of {len(rows)} rows)"])


def agreement_table(rows: list[dict[str, Any]], replicates: list[dict[str, Any]]) -> str:
    """Lay out what each further E batch predicts beside what the first one measures.

    Args:
        rows: of results.parquet, at least one.
        replicates: of replicates.parquet.

    Returns:
        A table of the first normalisation with a line below it on all of them; nothing where there is one E batch.
    """
    found = list(independent(rows, replicates))
    if not found:
        return ""
    shown = [row for row in found if row["normalization"] == rows[0]["normalization"]]
    columns = [name for name in shown[0] if name not in ("normalization", "agrees")]
    lines = [columns, *([_text(row[name]) for name in columns] for row in shown)]
    apart = sum(not row["agrees"] for row in found)
    score_z = max((row["mean_score_z"] for row in rows), key=abs)
    return "\n".join(
        [
            *aligned(lines),
            "(snis on the first E batch against the prediction on further ones: "
            + (f"{apart} of {len(found)} disagree" if apart else "all agree or are nonlinear")
            + f"; largest z of a mean score {score_z:.2f})",
        ]
    )


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out two runs, checkpoint by checkpoint, for the first normalisation.

    Args:
        rows: of compare.parquet, at least one.

    Returns:
        A table with aligned columns, and a line that says what it shows.
    """
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    lines = [COMPARISON, *([_text(rounded(row[name])) for name in COMPARISON] for row in shown)]
    return "\n".join([*aligned(lines), f"({normalization}, the other less the first; intervals for this update)"])


def interventions_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out what each intervention changes, for the first normalisation and the deepest level that has all of them.

    Args:
        rows: of interventions.parquet, at least one.

    Returns:
        A table with aligned columns, and a line that says what it shows.
    """
    normalization = rows[0]["normalization"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["normalization"] == normalization:
            groups.setdefault(row["checkpoint"], []).append(row)
    shown = [row for group in groups.values() for row in deepest(group)]
    lines = [INTERVENTIONS, *([_text(rounded(row[name])) for name in INTERVENTIONS] for row in shown)]
    level = shown[0]["level"]
    return "\n".join([*aligned(lines), f"({normalization}, {level}; differences from the run as it is, same E and U)"])


RESULT = "The result:"
"""How the log of a run begins what `summary` says; it is one entry, so that nothing of it is lost."""


def summary(run_directory: Path) -> str:
    """Say what came out of a recorded run: its warnings, the answer, the tables.

    Args:
        run_directory: its folder.

    Returns:
        Lines for a terminal.
    """
    run = RecordedRun(run_directory.parents[1], run_directory.name)
    rows, replicates, tried = (run.rows(name) for name in ("results", "replicates", "interventions"))
    shown = [row for row in rows if row["normalization"] == rows[0]["normalization"]]
    parts = [f"WARNING: {warning}" for warning in run.warnings]
    parts += [textwrap.fill(run.answer, 120), terminal_table(rows)]
    parts += ["\n".join(sentences)] if (sentences := list(order_sentences(shown))) else []
    parts += [agreement] if (agreement := agreement_table(rows, replicates)) else []
    parts += [interventions_table(tried)] if tried else []
    return "\n\n".join(parts)


def print_results(run_directory: Path) -> None:
    """Print the warnings and the tables of a recorded run, and which files are in its folder.

    Args:
        run_directory: its folder.
    """
    print(f"\n{summary(run_directory)}\n\n{run_directory}/")
    for path in sorted(run_directory.iterdir()):
        print(f"    {path.name}")


def show(root: Path, run_id: str, in_browser: bool) -> int:
    """Print the results of a recorded run again; open its report in the browser if asked.

    Args:
        root: of the store.
        run_id: of the run; `latest` is the sweep that finished last.
        in_browser: whether to open `report.html`.

    Returns:
        The exit status, 0.

    Raises:
        ProbeError: there is no such run, it has no such page, or there is no browser.
    """
    directory = runs.find(root, run_id)
    with _explained(directory):
        print_results(directory)
    page = directory.absolute() / "report.html"
    if not page.exists():
        cause = "it was recorded by an earlier version"
        raise ProbeError(
            f"{directory} has no report.html", cause=cause, fix=f"`entropy-probe variance {directory.name}`"
        )
    print(f"\nThe report, in one file to read and to share: {page}")
    if in_browser and not webbrowser.open(page.as_uri()):
        raise ProbeError("no browser could be started", fix=f"open {page} in one")
    return 0


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Say that the tables of a run are not what they were, as in a store that came from elsewhere."""
    try:
        yield
    except BrokenPipeError:  # `entropy-probe report | head`
        raise
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"the tables in {directory} cannot be shown: {one_line(error)}",
            cause="they were edited, damaged, or written by another version",
            fix=f"`entropy-probe variance {directory.name}` writes them anew",
        ) from None


def inline_figures(markdown: str, locate: Callable[[str], Path]) -> str:
    """Put the figures into the page, so that it can be shown away from them.

    Args:
        markdown: a page with links such as `![entropy](entropy.png)`.
        locate: file name → where the figure is.

    Returns:
        The page with every PNG as a data URI.
    """

    def embed(link: re.Match[str]) -> str:
        data = base64.b64encode(locate(link[2]).read_bytes()).decode()
        return f"![{link[1]}](data:image/png;base64,{data})"

    return re.sub(r"!\[([^\]]*)\]\(([^()\s:]+\.png)\)", embed, markdown)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text whose columns end at the same places, from lines of cells."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]


def duration(seconds: float) -> str:
    """A time in a unit that suits it."""
    if seconds < 100:
        return f"{seconds:.{0 if seconds >= 10 or not seconds else 1}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes in a unit that suits it."""
    unit = next((unit for unit in (1e9, 1e6) if count >= unit), 1e3)
    return f"{count / unit:.3g} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'})[unit]}"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
