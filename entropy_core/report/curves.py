"""Two figures of a sweep: whether the prediction held, and the entropy along the training."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropy_core.estimates.selection import (
    Row,
    at_learning_rate,
    best_prediction,
    first_of_each,
    interval_of,
)
from entropy_core.numerics.uncertainty import normal_quantile
from entropy_core.report.drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Training,
    half_widths,
    in_units,
    legend_below,
    say_nothing_measured,
)

WHAT = {"delta_h1": "δH₁", "delta_h12": "δH₁ + δH₂"}


def prediction(figure: Figure, rows: Sequence[Row], unit: str, training: Training) -> None:
    """Draw the measured change against the predicted one at the learning rate, a point for each checkpoint."""
    axes = figure.subplots()
    estimator = rows[0]["estimator"]
    shown = [row for row in at_learning_rate(rows) if row["delta_h"] is not None and row["estimator"] == estimator]
    axes.set_title("Predicted and measured change of the entropy by one step")
    if not shown:
        say_nothing_measured(axes, "At no checkpoint was ΔH measured at the learning rate.")
        return
    for row in shown:
        best, look = best_prediction(row), training.looks[row["checkpoint"]]
        axes.errorbar(
            row[best],
            row["delta_h"],
            xerr=half_widths([row], interval_of(best, "this")),
            yerr=half_widths([row], "delta_h_this_update"),
            fmt=look.marker,
            color=look.color,
            markersize=6 if training.few else 4,
            elinewidth=0.8,
            label=training.name(row["checkpoint"]) if training.few else None,
        )
    low, high = _span([row[best_prediction(row)] for row in shown] + [row["delta_h"] for row in shown])
    axes.plot([low, high], [low, high], color=BLACK, linewidth=0.8, zorder=1, label="as predicted")
    orders = {best_prediction(row) for row in shown}
    what = WHAT[orders.pop()] if len(orders) == 1 else "change (the best known order)"
    per = in_units(axes.xaxis, [low, high], unit)
    axes.set_xlabel(f"predicted {what} [{per}], at {_multiples(shown)}")
    axes.set_ylabel(f"measured ΔH [{in_units(axes.yaxis, [low, high], unit)}]")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    training.add_key(figure, [axes])
    legend_below(figure, [axes], 3)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of the finite values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def _multiples(rows: Sequence[Row]) -> str:
    """Which multiple of the learning rate the rows are at."""
    found = {float(f"{row['eta_over_lr']:.6g}") for row in rows}
    return f"{found.pop():g} × lr" if len(found) == 1 else "the multiple closest to the lr"


def along_training(figure: Figure, rows: Sequence[Row], unit: str, logged: Mapping[str, float]) -> None:
    """Draw H, the entropy that the trainer logged, and the predicted steps; below, the change by one step."""
    figure.set_size_inches(6.4, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    first = sorted(first_of_each(rows), key=lambda row: row["step"])
    at_lr = [row for row in at_learning_rate(rows) if row["estimator"] == rows[0]["estimator"]]
    at_lr.sort(key=lambda row: row["step"])
    values = _entropies(above, first, logged)
    _predicted_steps(above, at_lr, values)
    above.set_ylabel(f"entropy [{in_units(above.yaxis, values, unit)}]")
    above.set_title("Entropy along the training, and its change by the next step")
    _changes(below, at_lr, unit)
    below.set_xlabel("training step")
    steps = [row["step"] for row in first]
    room = 0.04 * (max(steps) - min(steps)) or 1.0
    below.set_xlim(min(steps) - room, max(steps) + (_gap(steps) if len(steps) > 1 else 0) + room)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    legend_below(figure, [above, below], 2)


def _gap(steps: Sequence[int]) -> int:
    """Steps between the last two checkpoints."""
    return steps[-1] - steps[-2]


def _entropies(axes: Axes, first: Sequence[Row], logged: Mapping[str, float]) -> list[float]:
    """H with its interval, and what the trainer logged; returns the values that are to be seen."""
    quantile = normal_quantile(first[0]["confidence_level"])
    level = f"{100 * first[0]['confidence_level']:.6g} % interval"
    half = [quantile * row["H_se"] for row in first]
    H = [row["H"] for row in first]
    axes.errorbar(
        [row["step"] for row in first], H, yerr=half, fmt="o-", color=BLUE, label=f"H on E, {level} for this policy"
    )
    of_trainer = [(row["step"], logged[row["checkpoint"]]) for row in first if row["checkpoint"] in logged]
    if of_trainer:
        axes.plot(*zip(*of_trainer, strict=True), "x:", color=ORANGE, markersize=5.5, label="logged by the trainer")
    ends = [value + sign * of for value, of in zip(H, half, strict=True) for sign in (-1, 1)]
    return [*ends, *(value for _, value in of_trainer)]


def _predicted_steps(axes: Axes, at_lr: Sequence[Row], values: Sequence[float]) -> None:
    """From each H a line to where it would be at the next checkpoint if each step until then did what δH₁ says."""
    low, high = _span(values)
    size = (high - low) or abs(high) or 1.0
    ends: list[float] = []
    steps = [row["step"] for row in at_lr]
    gaps = [after - before for before, after in pairwise(steps)]
    for row, gap in zip(at_lr, [*gaps, *(gaps[-1:] or [1])], strict=False):
        end = row["H"] + gap * row["delta_h1"] / row["eta_over_lr"]
        ends.append(end)
        label = "H if each step up to the next checkpoint does δH₁"
        axes.plot([row["step"], row["step"] + gap], [row["H"], end], "--", color=BLACK, linewidth=0.9, label=label)
    low, high = max(min([low, *ends]), low - size), min(max([high, *ends]), high + size)
    margin = 0.06 * (high - low) or 0.06 * size
    axes.set_ylim(low - margin, high + margin)


def _changes(axes: Axes, at_lr: Sequence[Row], unit: str) -> None:
    """The predicted change by one step with its interval, and the measured one beside it."""
    axes.axhline(0, color=BLACK, linewidth=0.8)
    if not at_lr:
        axes.set_ylabel(f"change by one step\n[{unit}]")
        axes.text(0.5, 0.6, "No step size but 0.", transform=axes.transAxes, ha="center", color=GREY, fontsize=8)
        return
    resolved = all(best_prediction(row) == "delta_h12" for row in at_lr)
    best = "delta_h12" if resolved else "delta_h1"
    known = all(row[f"{interval_of(best, 'next')}_low"] is not None for row in at_lr)
    update = "next" if known else "this"
    half = half_widths(at_lr, interval_of(best, update))
    predicted = [row[best] for row in at_lr]
    level = f"{100 * at_lr[0]['confidence_level']:.6g} % interval"
    axes.errorbar(
        [row["step"] for row in at_lr],
        predicted,
        yerr=half,
        fmt="s-",
        markersize=3,
        color=BLACK,
        label=f"{WHAT[best]}, {level} for {'the next' if known else 'this'} update",
    )
    measured = [(row["step"], row["delta_h"]) for row in at_lr if row["delta_h"] is not None]
    if measured:
        x, y = zip(*measured, strict=True)
        axes.plot(x, y, "D", color=ORANGE, mfc="none", markersize=8, label="measured ΔH, this update")
    ends = [*predicted, *(value for _, value in measured)]
    ends += [value + of for value, of in zip(predicted, half[0], strict=True) if math.isfinite(of)]
    per = in_units(axes.yaxis, ends, unit)
    axes.set_ylabel(f"change by a step of {_multiples(at_lr)}\n[{per}]")
