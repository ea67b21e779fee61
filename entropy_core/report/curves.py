"""The three figures of a sweep: whether the prediction held, whether the change is linear, and the whole training."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from entropy_core.estimates.selection import (
    Row,
    at_learning_rate,
    best_prediction,
    by_checkpoint,
    first_of_each,
    interval_of,
)
from entropy_core.numerics.uncertainty import normal_quantile
from entropy_core.numerics.verdicts import MATERIAL_CURVATURE
from entropy_core.report.drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Training,
    half_widths,
    in_units,
    legend_below,
    number,
    say_nothing_measured,
)

ESTIMATORS = {
    "per_decision": (BLUE, "o"),
    "weighted_per_decision": ("#009e73", "^"),
    "snis": (ORANGE, "D"),
    "path_integral": (BLACK, "s"),
}
"""Colour and marker of each estimator of ΔH."""

WIDEST = 0.5
"""A ratio whose interval reaches further than this does not decide what range the axis shows."""

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


# --- ΔH/δH₁ against the step size ------------------------------------------------------------------------------------


def eta_sweep(figure: Figure, rows: Sequence[Row], training: Training) -> None:
    """Draw ΔH/δH₁ against the step size: a panel for each of a few checkpoints, one for all of many."""
    groups = by_checkpoint(rows)
    columns = min(len(groups), 3) if training.few else 1
    lines = -(-len(groups) // columns) if training.few else 1
    figure.set_size_inches(6.4, 1.3 + (2.3 if columns > 1 else 2.8) * lines)
    panels: list[Axes] = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    low, high = _range_of_ratios(rows)
    for axes in panels:
        axes.axhspan(
            1 - MATERIAL_CURVATURE,
            1 + MATERIAL_CURVATURE,
            color="0.85",
            linewidth=0,
            label=f"linear: within {MATERIAL_CURVATURE:.0%}",
        )
        axes.axhline(1, color=BLACK, linewidth=0.8, zorder=1)
        axes.set_ylim(low, high)
    if training.few:
        for axes, (checkpoint, group) in zip(panels, groups.items(), strict=False):
            _ratios_of_one(axes, group, low, high)
            axes.set_title(training.name(checkpoint), fontsize=9)
        for axes in panels[len(groups) :]:
            axes.remove()
        panels = panels[: len(groups)]
    else:
        _ratios_of_all(panels[0], groups, training, low, high)
        panels[0].set_title("Measured change as a part of the first-order prediction")
    _step_sizes(panels, rows)
    for axes in panels[-columns:]:
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("step size η / lr")
    figure.supylabel("ΔH / δH₁", fontsize=9)
    training.add_key(figure, panels)
    legend_below(figure, panels, 3)


def _with_ratio(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a ratio: measured, with a step and a prediction that are not 0."""
    return [row for row in rows if row["eta"] and row["delta_h1"] and row["delta_h"] is not None]


def _half_width(row: Row) -> float:
    """Half the interval of ΔH − δH₁, as a part of δH₁. Both share E, and most of their errors is the same error."""
    quantile = normal_quantile(row["confidence_level"])
    return quantile * number(row["paired_difference_se"]) / abs(row["delta_h1"])


def _range_of_ratios(rows: Sequence[Row]) -> tuple[float, float]:
    """What part of the axis is shown: ratios that are known, their intervals, and what the second order predicts."""
    ends = [0.9, 1.1]
    for row in _with_ratio(rows):
        ratio, half = row["delta_h"] / row["delta_h1"], _half_width(row)
        if half <= WIDEST and row["weights_reliable"]:
            ends += [ratio - half, ratio + half]
        if row["second_order"] == "resolved":
            ends.append(row["delta_h12"] / row["delta_h1"])
    low, high = max(min(ends), -1.0), min(max(ends), 3.0)
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _ratios_of_one(axes: Axes, group: Sequence[Row], low: float, high: float) -> None:
    second = {row["eta"]: row for row in group if row["eta"] and row["delta_h1"] and row["second_order"] == "resolved"}
    for sign in (1, -1):
        line = sorted((row for row in second.values() if row["eta"] * sign > 0), key=lambda row: abs(row["eta"]))
        if len(line) > 1:
            x, y = [abs(row["eta_over_lr"]) for row in line], [row["delta_h12"] / row["delta_h1"] for row in line]
            axes.plot(x, y, "--", color=BLACK, label="(δH₁ + δH₂) / δH₁")
    estimators = list(dict.fromkeys(row["estimator"] for row in group))
    smallest, largest = _ends_of_step_sizes(group)
    apart = (largest / smallest) ** 0.035  # so that points of several estimators do not hide each other
    for number_of, estimator in enumerate(estimators):
        beside = apart ** (number_of - (len(estimators) - 1) / 2)
        color, marker = ESTIMATORS[estimator]
        of_estimator = [row for row in _with_ratio(group) if row["estimator"] == estimator]
        for row in of_estimator:
            x, y = abs(row["eta_over_lr"]) * beside, row["delta_h"] / row["delta_h1"]
            if not low <= y <= high:
                _beyond(axes, x, y > high, low, high, color)
                continue
            axes.errorbar(
                x,
                y,
                yerr=_half_width(row),
                fmt=marker,
                color=color,
                markerfacecolor=color if row["eta"] > 0 else "white",
                alpha=1.0 if row["weights_reliable"] else 0.4,
                label=_label_of(row),
            )
    if not _with_ratio(group):
        axes.text(0.5, 0.2, "ΔH not measured", transform=axes.transAxes, ha="center", color=GREY, fontsize=8)


def _label_of(row: Row) -> str:
    if not row["weights_reliable"]:
        return "pale: weights unreliable"
    return f"ΔH / δH₁, {row['estimator']}" if row["eta"] > 0 else f"{row['estimator']}, η < 0"


def _beyond(axes: Axes, x: float, above: bool, low: float, high: float, color: str) -> None:
    """Mark at the edge that a point lies beyond it."""
    end, marker = (high, CARETUP) if above else (low, CARETDOWN)
    axes.plot(
        x, end, marker=marker, color=color, markersize=6, linestyle="none", clip_on=False, label="beyond the axis"
    )


def _ratios_of_all(
    axes: Axes, groups: Mapping[str, Sequence[Row]], training: Training, low: float, high: float
) -> None:
    """One line for each checkpoint, of the first estimator; hollow where the weights are not to be trusted."""
    for checkpoint, group in groups.items():
        look = training.looks[checkpoint]
        of_first = [row for row in _with_ratio(group) if row["estimator"] == group[0]["estimator"] and row["eta"] > 0]
        known = sorted(
            (row for row in of_first if row["weights_reliable"] and _half_width(row) <= WIDEST),
            key=lambda row: row["eta"],
        )
        x, y = [row["eta_over_lr"] for row in known], [row["delta_h"] / row["delta_h1"] for row in known]
        axes.plot(x, y, "o-", color=look.color, markersize=3, linewidth=0.8)
        for row in of_first:
            ratio = row["delta_h"] / row["delta_h1"]
            if row not in known and low <= ratio <= high:
                hollow = "noise or weights too large to tell"
                axes.plot(row["eta_over_lr"], ratio, "o", color=GREY, markersize=3, mfc="white", label=hollow)


def _ends_of_step_sizes(rows: Sequence[Row]) -> tuple[float, float]:
    sizes = [abs(row["eta_over_lr"]) for row in rows if row["eta"]] or [1.0]
    return min(sizes) / 1.6, max(sizes) * 1.6


def _step_sizes(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
    """A logarithmic axis with plain numbers, as wide as the step sizes."""
    low, high = _ends_of_step_sizes(rows)
    decades = math.log10(high / low)
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0), numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


# --- along the training ----------------------------------------------------------------------------------------------


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
