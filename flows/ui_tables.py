"""What fits on a page of Prefect's UI in a window of 1,280 pixels: a table wraps nothing, and is 720 pixels wide."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_core.estimates.selection import Row, unit_of
from entropy_core.report.interventions import deepest
from entropy_core.report.markdown import markdown_rows
from entropy_core.report.recorded_run import RecordedRun
from flows.numbers import numbers_of_each

_WHY = 20
"""Characters of a reason that have a place."""


def result_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Lay out what is known of a checkpoint, a row per step size and estimator.

    Args:
        rows: of results.parquet, of one checkpoint.

    Returns:
        Rows of its first normalisation with six columns, as text but for the step size, so that they sort by it.
    """
    return [
        {
            "η / lr": float(f"{row['eta_over_lr']:.4g}"),
            "δH₁": _number(row["delta_h1"]),
            "ΔH ± SE": f"{_number(row['delta_h'])} ± {_unsigned(row['delta_h_se'])}",
            "ESS/N": _unsigned(row["ess_fraction"]),
            "verdict": row["verdict"],
            "estimator": row["estimator"],
        }
        for row in rows
        if row["normalization"] == rows[0]["normalization"]
    ]


def intervention_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Lay out what would change a checkpoint's step, the best first.

    Args:
        rows: of interventions.parquet, of one checkpoint.
    """
    ranked = deepest([row for row in rows if row["normalization"] == rows[0]["normalization"]])
    return [
        {
            "intervention": row["intervention"],
            "δH₁": _number(row["delta_h1"]),
            "difference": f"{_number(row['difference'])} {_interval(row['low'], row['high'])}",
            "verdict": row["verdict"],
        }
        for row in ranked
    ]


def plan_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Shorten a plan.

    Args:
        rows: of `flows.plan.plan_table`.
    """
    return [
        {
            "stage": row["stage"],
            "of": row["of"],
            "cached": row["cached"],
            "would run": row["would run"],
            "time": row["time"],
            "why": row["why"] if len(row["why"]) <= _WHY else f"{row['why'][: _WHY - 1]}…",
        }
        for row in rows
    ]


def answer(run: RecordedRun) -> str:
    """Say what a run was made for, the warnings first, as markdown; `summary_page` goes on below it."""
    return "\n\n".join([*(f"> **Warning:** {warning}" for warning in run.warnings), run.answer])


def summary_page(run: RecordedRun, tables: Sequence[tuple[str, str]]) -> str:
    """Write what stands below the answer: a row per checkpoint, 600 pixels wide, and where the rest is.

    Args:
        run: as it was recorded.
        tables: keys of the other artifacts of the run, each with what it shows.

    Returns:
        Markdown.
    """
    numbers = numbers_of_each(run.rows("results"))
    first = numbers[0]
    head = ("checkpoint", "H", "verdict", "predicted", "measured ± SE")
    body = [
        (
            str(row["checkpoint"]),
            _unsigned(row["H"]),
            str(row["verdict"]),
            _number(row["prediction"]),
            f"{_number(row['delta_h'])} ± {_unsigned(row['delta_h_se'])}",
        )
        for row in numbers
    ]
    parent = f" · a rerun of `{run.rerun_of}`" if run.rerun_of else ""
    lines = [
        *markdown_rows(head, body),
        "",
        f"Changes of the entropy H in {unit_of(first['normalization'])}, by a step of {first['eta_over_lr']:g} × the "
        "learning rate.",
        "",
        *markdown_rows(("artifact of this run", "shows"), [(f"`{key}`", shows) for key, shows in tables], 2),
        "",
        f"Run `{run.id}`{parent}. Its files, with `report.html` to share: `{Path(run.directory).absolute()}`",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}" if value else "0"


def _unsigned(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"[{low:+.3g}, {high:+.3g}]"
