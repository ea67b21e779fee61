"""The figure of ΔH/δH₁ against the step size: is the change linear, and where does it leave the prediction?"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from entropy_core.estimates.selection import Row, by_checkpoint
from entropy_core.numerics.uncertainty import normal_quantile
from entropy_core.numerics.verdicts import MATERIAL_CURVATURE
from entropy_core.report.drawing import BLACK, BLUE, GREY, ORANGE, Training, legend_below, number

ESTIMATORS = {
    "per_decision": (BLUE, "o"),
    "weighted_per_decision": ("#009e73", "^"),
    "snis": (ORANGE, "D"),
    "path_integral": (BLACK, "s"),
}
"""Colour and marker of each estimator of ΔH."""

WIDEST = 0.5
"""A ratio whose interval reaches further than this does not decide what range the axis shows."""


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
