"""Select and group rows of the tables of a run, and name the columns of a prediction."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def best_prediction(row: Row) -> str:
    """Return the name of a row's best prediction: `delta_h12` where the second order is resolved, else `delta_h1`."""
    return "delta_h12" if row["second_order"] == "resolved" else "delta_h1"


def interval_of(prediction: str, update: str) -> str:
    """Return how the columns of an interval begin: of `delta_h1` or `delta_h12`, for the update this, mean or next."""
    return f"{'delta_h12_' if prediction == 'delta_h12' else ''}{update}_update"


def unit_of(normalization: str) -> str:
    """Return the unit of entropies under a normalisation."""
    return "nats per token" if normalization == "per_token" else "nats per sequence"


def at_learning_rate(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of each checkpoint at the non-zero step size closest to the learning rate."""
    chosen = []
    for group in by_checkpoint([row for row in rows if row["eta"] != 0]).values():
        closest = min((row["eta"] for row in group), key=lambda eta: abs(eta / group[0]["learning_rate"] - 1))
        chosen += [row for row in group if row["eta"] == closest]
    return chosen


def by_checkpoint(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by checkpoint name, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["checkpoint"], []).append(row)
    return groups


def by_run_directory(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by the run directory of their checkpoints, as far as the checkpoints' names tell it.

    Args:
        rows: with `checkpoint` and `step`.

    Returns:
        Rows by run directory, in order; all of them under "" where no training step is in two of these.
    """
    directory_of = {row["checkpoint"]: _run_directory(row["checkpoint"], row["step"]) for row in rows}
    steps = {(directory_of[row["checkpoint"]], row["step"]) for row in rows}
    if len(steps) == len({step for _, step in steps}):
        return {"": list(rows)}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(directory_of[row["checkpoint"]], []).append(row)
    return groups


def _run_directory(checkpoint: str, step: int) -> str:
    """What is before the last part of a name, without the step, which may be in it as in global_step_5/actor."""
    return re.sub(rf"(?<!\d){step}(?!\d)", "*", checkpoint).rpartition("/")[0]


def first_of_each(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of each checkpoint."""
    return [group[0] for group in by_checkpoint(rows).values()]
