"""The figure of a rehearsal: entropy and expected reward along the steps, with bands between seeds."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropy_core.estimates.selection import Row, by_checkpoint, unit_of
from entropy_core.report import glyphs
from entropy_core.report.drawing import BLACK, BY_STEP, MARKERS, STYLE, half_widths, in_units, legend_below, short

DRAWN = 5
"""Interventions that are drawn beside the run as it is: those of the largest difference of the entropy."""


def rehearsal_figure(rows: Sequence[Row]) -> Figure:
    """Draw H, and J if it is known, against the number of steps from the last checkpoint that was rehearsed.

    Args:
        rows: of `rehearsal.parquet`, of one normalisation.

    Returns:
        A line for each intervention, with its interval; the band is that of one more run as it is.
    """
    together = [row for row in rows if row["replicate"] is None]
    checkpoint, group = list(by_checkpoint(together).items())[-1]
    lines: dict[str, list[Row]] = {}
    for row in group:
        lines.setdefault(row["intervention"], []).append(row)
    of_run, *others = lines.values()
    others = sorted(others, key=lambda line: -abs(line[-1]["difference"]))[:DRAWN]
    names = ["H", "J"] if all(row["J"] is not None for row in group) else ["H"]
    units = {"H": unit_of(rows[0]["normalization"]), "J": "reward"}
    fonts = glyphs.families("".join(lines) + checkpoint)
    with matplotlib.rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(6.4, 1.2 + 2.3 * len(names)), layout="constrained")
        all_axes: list[Axes] = list(figure.subplots(len(names), 1, sharex=True, squeeze=False).flat)
        for axes, name in zip(all_axes, names, strict=True):
            _band(axes, of_run, name)
            for place, line in enumerate([of_run, *others]):
                _line(axes, line, name, place, len(others), short(line[0]["intervention"], fonts))
            if name == "H" and (floor := of_run[0]["floor"]) is not None:
                axes.axhline(floor, color=BLACK, linestyle=":", linewidth=0.8, label="floor")
            values = [row[name] for line in (of_run, *others) for row in line]
            axes.set_ylabel(f"{name} [{in_units(axes.yaxis, values, units[name])}]")
        all_axes[0].set_title(f"Rehearsal from {short(checkpoint, fonts)}", fontsize=9)
        all_axes[-1].set_xlabel("steps since the checkpoint")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, all_axes, 3)
    return figure


def _band(axes: Axes, line: Sequence[Row], name: str) -> None:
    if line[0][f"{name}_run_low"] is not None:
        steps = [row["rehearsal_step"] for row in line]
        low, high = ([row[f"{name}_run_{end}"] for row in line] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color="0.88", linewidth=0, label="band of one more run as it is")


def _line(axes: Axes, line: Sequence[Row], name: str, place: int, others: int, label: str) -> None:
    colour = BLACK if place == 0 else BY_STEP((place - 0.5) / max(others, 1))
    axes.errorbar(
        [row["rehearsal_step"] + 0.04 * place for row in line],
        [row[name] for row in line],
        yerr=half_widths([{"i_low": row[f"{name}_low"], "i_high": row[f"{name}_high"]} for row in line], "i"),
        fmt=f"{MARKERS[place]}-",
        color=colour,
        elinewidth=0.8,
        label=label,
    )
