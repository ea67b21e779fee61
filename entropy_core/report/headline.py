"""What a reader looks at first: a few columns of the result table, rounded; in the terminal, as CSV and as JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entropy_core.estimates.selection import best_prediction, interval_of

HEADLINE = (
    "checkpoint",
    "eta_over_lr",
    "normalization",
    "estimator",
    "H",
    "delta_h1",
    "prediction",
    "next_low",
    "next_high",
    "delta_h",
    "delta_h_se",
    "ess_fraction",
    "verdict",
)


def headline(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Select and round what a reader looks at first.

    Args:
        rows: of results.parquet.

    Returns:
        As many rows with the columns `HEADLINE`, in four significant digits; None for what is not a finite number.
        `prediction` is the best one, with the ends of its interval for the next update.
    """
    return selected([{**row, **_prediction(row)} for row in rows], HEADLINE)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the headline of result rows as CSV, a line of names first; what is missing is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, HEADLINE, lineterminator="\n")
    table.writeheader()
    table.writerows(headline(rows))
    return text.getvalue()


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the headline of result rows as JSON: `{"rows": […]}`."""
    return json.dumps({"rows": headline(rows)}, ensure_ascii=False, indent=1) + "\n"


def selected(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Select columns, numbers in four significant digits; None for what is not a finite number."""
    return [{name: rounded(row[name]) for name in columns} for row in rows]


def rounded(value: Any) -> Any:
    """Round a number to four significant digits; None for what is not a finite number, other values as they are."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") + 0.0 if math.isfinite(value) else None


def _prediction(row: Mapping[str, Any]) -> dict[str, Any]:
    """The best prediction, to first or second order, and its interval for the next update."""
    best = best_prediction(row)
    following = interval_of(best, "next")
    return {"prediction": row[best], "next_low": row[f"{following}_low"], "next_high": row[f"{following}_high"]}
