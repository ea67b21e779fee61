"""What others are told of a probed checkpoint: a trainer, a tracker of experiments, an automation."""

from collections.abc import Sequence
from typing import Any

from entropy_core.estimates.selection import Row, at_learning_rate, first_of_each
from entropy_core.report.headline import headline

_TOLD = (
    *("checkpoint", "step", "eta_over_lr", "normalization", "H", "delta_h1", "prediction", "next_low", "next_high"),
    *("delta_h", "delta_h_se", "ess_fraction", "verdict"),
)
_DIRECTIONS = {"negative": "falling", "positive": "rising"}


def numbers_of_each(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Select what is told of each checkpoint, at the step size closest to the learning rate.

    Args:
        rows: of results.parquet.

    Returns:
        For each checkpoint, in order, JSON values: numbers in four significant digits, in nats per token or sequence;
        `verdict`; and `direction`, in which this update takes the entropy: falling, rising or unknown.
    """
    moved: dict[str, Row] = {row["checkpoint"]: row for row in first_of_each(at_learning_rate(rows))}
    chosen = [dict(moved.get(row["checkpoint"], row)) for row in first_of_each(rows)]
    shown = [row | of for row, of in zip(chosen, headline(chosen), strict=True)]
    direction = [_DIRECTIONS.get(row["sign_this_update"], "unknown") for row in chosen]
    return [{name: row[name] for name in _TOLD} | {"direction": d} for row, d in zip(shown, direction, strict=True)]
