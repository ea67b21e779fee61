"""The figures of a sweep, and how they are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from entropy_core.estimates.selection import Row, by_checkpoint, unit_of
from entropy_core.report import curves, glyphs, ratios, tokens_in_text
from entropy_core.report.drawing import ORANGE, STYLE, Training, in_units, legend_below, number, short
from entropy_core.report.interventions import deepest

SIZE = (6.4, 4.6)  # inches
MOST_PANELS = 6
"""Checkpoints whose interventions are drawn."""


def figures(rows: Sequence[Row], compared: Sequence[Row] = ()) -> dict[str, Figure]:
    """Draw the three figures of a sweep, for its first normalisation.

    Args:
        rows: rows of the result table.
        compared: rows of `agreement.parquet`, for the entropy that the trainer logged.

    Returns:
        Figures by name: measured against predicted change, ΔH/δH₁ against η, and the entropy along the training.
    """
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    entropies = [row for row in compared if row["quantity"] == "entropy" and normalization == "per_token"]
    logged = {row["checkpoint"]: row["trainer"] for row in entropies if row["trainer"] is not None}
    unit, training = unit_of(normalization), Training(shown)
    with matplotlib.rc_context(STYLE | {"font.family": training.fonts}):
        drawn = {name: Figure(figsize=SIZE, layout="constrained") for name in ("prediction", "eta_sweep", "training")}
        curves.prediction(drawn["prediction"], shown, unit, training)
        ratios.eta_sweep(drawn["eta_sweep"], shown, training)
        curves.along_training(drawn["training"], shown, unit, logged)
    return drawn


def intervention_figure(rows: Sequence[Row]) -> Figure:
    """Draw what each intervention changes, ranked, for every checkpoint.

    Args:
        rows: of `interventions.parquet`, of one normalisation.

    Returns:
        A panel of bars with paired intervals for each checkpoint: the exact steps, or the screen where none was taken;
        crosses are differences of the measured ΔH.
    """
    groups = {name: deepest(group) for name, group in by_checkpoint(rows).items()}
    last = len(groups) - 1
    drawn = sorted({round(k * last / (MOST_PANELS - 1)) for k in range(MOST_PANELS)})
    panels = [list(groups.items())[k] for k in drawn]
    fonts = glyphs.families("".join(row["checkpoint"] + row["intervention"] for row in rows))
    tallest = max(len(group) for _, group in panels)
    with matplotlib.rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(6.4, 1.0 + (0.5 + 0.19 * tallest) * len(panels)), layout="constrained")
        all_axes: list[Axes] = list(figure.subplots(len(panels), 1, squeeze=False).flat)
        for axes, (checkpoint, group) in zip(all_axes, panels, strict=True):
            measured = [row for row in rows if row["checkpoint"] == checkpoint and row["level"] == "measure"]
            largest = _bars(axes, group, measured, fonts)
            unit = in_units(axes.xaxis, [largest], unit_of(rows[0]["normalization"]))
            axes.set_xlabel(f"difference of δH₁ from the run as it is [{unit}]")
            axes.set_title(short(checkpoint, fonts), fontsize=9)
        if len(panels) < len(groups):
            figure.suptitle(f"{len(panels)} of {len(groups)} checkpoints, spread over the training", fontsize=9)
        legend_below(figure, all_axes, 3)
    return figure


_BARS: dict[str, dict[str, Any]] = {
    "acts": {"color": "#0072b2"},
    "does not act": {"color": "0.82"},
    "cannot tell": {"color": "white", "edgecolor": "0.55", "hatch": "////"},
    "as it is": {"color": "black"},
}
"""How the bars of each verdict look; told apart by lightness and hatching, not by hue."""


def _bars(axes: Axes, group: Sequence[Row], measured: Sequence[Row], fonts: list[str]) -> float:
    """Draw the ranked differences; the axis goes three margins beyond what acts, whatever the others are.

    Returns the end of the axis.
    """
    margin = group[0]["margin"]
    places = {row["intervention"]: k for k, row in enumerate(group)}
    axes.axvspan(-margin, margin, color="0.93", linewidth=0, label="margin: does not matter")
    for row in group:
        axes.barh(
            places[row["intervention"]], row["difference"], height=0.7, label=row["verdict"], **_BARS[row["verdict"]]
        )
    reach = [(number(row["high"]) - number(row["low"])) / 2 for row in group]
    axes.errorbar(
        [row["difference"] for row in group],
        list(places.values()),
        xerr=reach,
        fmt="none",
        ecolor="black",
        elinewidth=0.7,
        label="interval for the mean update",
    )
    at = [(row["difference"], places[row["intervention"]]) for row in measured if row["intervention"] in places]
    if at:
        axes.plot(*zip(*at, strict=True), "x", color=ORANGE, label="of the measured ΔH")
    largest = max([abs(row["difference"]) for row in group if row["verdict"] == "acts"] + [margin])
    end = 1.2 * largest + 3 * margin
    axes.set_xlim(-end, end)
    axes.set_yticks(list(places.values()), [short(name, fonts) for name in places], fontsize=7)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return float(end)


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
    shown = tokens_in_text.passages(tokens, sequences, f"share_{normalization}")
    figure = Figure()
    with matplotlib.rc_context(STYLE):
        title = f"Tokens that change the entropy most: {checkpoint}"
        tokens_in_text.draw(figure, shown, title, unit_of(normalization))
    return figure


def save_figure(figure: Figure, png: Path, svg: Path) -> None:
    """Write a figure as PNG and SVG, without dates, so that equal figures give equal files."""
    with matplotlib.rc_context(STYLE):
        figure.dpi = 144
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # `savefig` would go through it twice
        figure.set_layout_engine("none")  # everything has its place by now
        figure.dpi = 72
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
