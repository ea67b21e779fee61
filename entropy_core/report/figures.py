"""The figures of a sweep."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from entropy_core.estimates.tables import (
    Row,
    at_learning_rate,
    best_prediction,
    by_checkpoint,
    first_of_each,
    interval_of,
    unit_of,
)
from entropy_core.numerics.uncertainty import normal_quantile
from entropy_core.report import tokens_in_text
from entropy_core.report.interventions import deepest

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # the name of a checkpoint may contain dollar signs
    "svg.hashsalt": "entropy-probe",  # otherwise element ids, and so the file's digest, would be random
}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw the three figures of a sweep, for its first normalisation.

    Args:
        rows: rows of the result table.

    Returns:
        Figures by name: measured against predicted change, ΔH against η, and entropy and δH₁ over training.
    """
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    unit = unit_of(normalization)
    with matplotlib.rc_context(STYLE):
        return {
            "prediction": _draw(_prediction, shown, unit),
            "eta_sweep": _draw(_eta_sweep, shown, unit),
            "training": _draw(_training, shown, unit),
        }


def intervention_figure(rows: Sequence[Row]) -> Figure:
    """Draw what each intervention changes, ranked, for every checkpoint.

    Args:
        rows: of `interventions.parquet`, of one normalisation.

    Returns:
        A panel of bars with paired intervals for each checkpoint: the exact steps, or the screen where none was taken;
        crosses are differences of the measured ΔH.
    """
    groups = {name: deepest(group) for name, group in by_checkpoint(rows).items()}
    tallest = max(map(len, groups.values()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.6 + (0.5 + 0.17 * tallest) * len(groups)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(len(groups), 1, squeeze=False).flat)
        for axes, (checkpoint, group) in zip(panels, groups.items(), strict=True):
            _bars(axes, group, [row for row in rows if row["checkpoint"] == checkpoint and row["level"] == "measure"])
            axes.set_title(checkpoint, fontsize=9)
        panels[-1].set_xlabel(f"difference of δH₁ from the run as it is [{unit_of(rows[0]['normalization'])}]")
    return figure


_COLOURS = {"acts": "tab:blue", "does not act": "tab:gray", "cannot tell": "lightgray", "as it is": "black"}


def _bars(axes: Axes, group: Sequence[Row], measured: Sequence[Row]) -> None:
    """Draw the ranked differences; the axis goes three margins beyond what acts, whatever the others are."""
    margin = group[0]["margin"]
    names = [row["intervention"] for row in group]
    for row in group:
        axes.barh(row["intervention"], row["difference"], color=_COLOURS[row["verdict"]], height=0.7)
    reach = [[(b - a) / 2 for a, b in zip(*_ends(group), strict=True)]] * 2
    values = [row["difference"] for row in group]
    axes.errorbar(values, names, xerr=reach, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5)
    at = {row["intervention"]: row["difference"] for row in measured if row["intervention"] in names}
    axes.plot(list(at.values()), list(at), "x", color="tab:red", markersize=4, label="of the measured ΔH")
    axes.axvspan(-margin, margin, color="tab:green", alpha=0.12, linewidth=0, label="margin")
    largest = max([abs(row["difference"]) for row in group if row["verdict"] == "acts"] + [margin])
    axes.set_xlim(-1.2 * largest - 3 * margin, 1.2 * largest + 3 * margin)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, loc="lower right")


def _ends(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [_number(row["low"]) for row in rows], [_number(row["high"]) for row in rows]


def token_figure(tokens: Sequence[Row], sequences: Sequence[Row], rows: Sequence[Row], checkpoint: str) -> Figure:
    """Draw the tokens of U that change the entropy most, with their context.

    Args:
        tokens: rows of `tokens.parquet` of first-order-u.
        sequences: rows of `sequences.parquet` of first-order-u.
        rows: rows of the result table; their first normalisation is used.
        checkpoint: name of the checkpoint.

    Returns:
        The figure.
    """
    normalization = rows[0]["normalization"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        shown = tokens_in_text.passages(tokens, sequences, f"share_{normalization}")
        tokens_in_text.draw(figure, shown, f"Tokens that change the entropy most: {checkpoint}", unit_of(normalization))
        return figure


def save_figure(figure: Figure, png: Path, svg: Path) -> None:
    """Write a figure as PNG and SVG, without dates, so that equal figures give equal files."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # tokens may be in any script
        figure.dpi = 144
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # `savefig` would go through it twice
        figure.set_layout_engine("none")  # everything has its place by now
        figure.dpi = 72
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})


def _draw(draw: Callable[[Figure, Sequence[Row], str], None], rows: Sequence[Row], unit: str) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure, rows, unit)
    return figure


def _reach(row: Row, interval: str) -> list[list[float]]:
    """Return the distances from the value of a row down and up to the ends of one of its intervals."""
    return _reaches([row], interval)


def _reaches(rows: Sequence[Row], interval: str) -> list[list[float]]:
    low, high = ([_number(row[f"{interval}_{end}"]) for row in rows] for end in ("low", "high"))
    return [[(b - a) / 2 for a, b in zip(low, high, strict=True)]] * 2


def _number(value: float | None) -> float:
    """Return NaN, which is not drawn, for what is missing."""
    return math.nan if value is None else value


def _prediction(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    axes = figure.subplots()
    estimator = rows[0]["estimator"]
    shown = [row for row in at_learning_rate(rows) if row["delta_h"] is not None and row["estimator"] == estimator]
    for row in shown:
        best = best_prediction(row)
        axes.errorbar(
            row[best],
            row["delta_h"],
            xerr=_reach(row, interval_of(best, "this")),
            yerr=_reach(row, "delta_h_this_update"),
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=row["checkpoint"],
        )
    ends = [
        row[name]
        for row in shown
        for name in (*(f"{interval_of(best_prediction(row), 'this')}_{end}" for end in ("low", "high")), "delta_h")
    ] or [0.0]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="as predicted")
    orders = {best_prediction(row) for row in shown}
    what = {"delta_h1": "δH₁", "delta_h12": "δH₁ + δH₂"}
    axes.set(
        xlabel=f"predicted {what[orders.pop()] if len(orders) == 1 else 'change'} [{unit}], this update",
        ylabel=f"measured ΔH [{unit}], this update",
        title=f"Predicted and measured entropy change, η = {shown[0]['eta_over_lr']:g} × lr" if shown else "",
    )
    axes.legend()


def _eta_sweep(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    groups = by_checkpoint(rows)
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure.set_size_inches(6.4, 1.0 + 2.6 * lines)
    panels: list[Axes] = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, (checkpoint, group) in zip(panels, groups.items(), strict=False):
        measured = [row for row in group if row["delta_h"] is not None]
        line = sorted(measured or group, key=lambda row: row["eta"])
        x = [row["eta_over_lr"] for row in line]
        axes.plot(x, [row["delta_h1"] for row in line], color="black", linewidth=0.8, label="δH₁")
        best = best_prediction(line[0])
        if best != "delta_h1":
            axes.plot(x, [row[best] for row in line], "--", color="black", linewidth=0.8, label="δH₁ + δH₂")
        for update, shade in (("this", 0.25), ("next", 0.1)):
            low, high = (
                [_number(row[f"{interval_of(best, update)}_{end}"]) for row in line] for end in ("low", "high")
            )
            axes.fill_between(
                x, low, high, color="black", alpha=shade, linewidth=0, label=f"predicted, {update} update"
            )
        for estimator in dict.fromkeys(row["estimator"] for row in group):
            part = [row for row in line if row["estimator"] == estimator and row["delta_h"] is not None]
            axes.errorbar(
                [row["eta_over_lr"] for row in part],
                [row["delta_h"] for row in part],
                yerr=_reaches(part, "delta_h_this_update"),
                fmt="o" if estimator == "per_decision" else "x",
                markersize=4,
                capsize=2,
                linewidth=1,
                label=f"ΔH {estimator}, this update",
            )
        axes.set_title(checkpoint, fontsize=9)
        axes.set_xlabel("η / lr", fontsize=9)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.supylabel(f"entropy change [{unit}]", fontsize=9)
    labels = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, fontsize=8)


def _training(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    at_lr = first_of_each(at_learning_rate(rows))
    first = first_of_each(rows)
    quantile = normal_quantile(rows[0]["confidence_level"])
    above.errorbar(
        [row["step"] for row in first],
        [row["H"] for row in first],
        yerr=[quantile * row["H_se"] for row in first],
        fmt="o-",
        markersize=4,
        capsize=2,
        linewidth=1,
    )
    above.set(ylabel=f"H [{unit}]", title="Entropy, and its predicted change by the next step")
    if at_lr:
        resolved = all(best_prediction(row) == "delta_h12" for row in at_lr)
        best = "delta_h12" if resolved else "delta_h1"
        following = interval_of(best, "next")
        known = all(row[f"{following}_low"] is not None for row in at_lr)
        below.errorbar(
            [row["step"] for row in at_lr],
            [row[best] for row in at_lr],
            yerr=_reaches(at_lr, following if known else interval_of(best, "this")),
            fmt="o-",
            markersize=4,
            capsize=2,
            linewidth=1,
        )
        multiples = {round(row["eta_over_lr"], 9) for row in at_lr}
        what = "δH₁ + δH₂" if resolved else "δH₁"
        below.set(ylabel=f"{what} at {multiples.pop():g} × lr" if len(multiples) == 1 else f"{what} closest to the lr")
    below.axhline(0, color="black", linewidth=0.8)
    below.set(xlabel="training step")
