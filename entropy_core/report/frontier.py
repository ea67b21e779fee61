"""The figure of what interventions do to entropy and reward together: which give most of one for least of the other."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_core.estimates.selection import Row, by_checkpoint, unit_of
from entropy_core.report import glyphs
from entropy_core.report.drawing import BLACK, BLUE, GREY, STYLE, half_widths, in_units, legend_below, short

NAMED = 8
"""Interventions on the frontier that are named in the figure, at most."""


def with_rewards(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Select by checkpoint the measured rows whose reward is known, where there are others than the run as it is."""
    found = by_checkpoint([row for row in rows if row["level"] == "measure" and row["difference_j"] is not None])
    return {checkpoint: group for checkpoint, group in found.items() if len(group) > 1}


def undominated(rows: Sequence[Row]) -> list[Row]:
    """Select the rows that no other row beats in entropy and reward, by rising reward."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row["difference_j"], -row["difference"])):
        if not found or row["difference"] > found[-1]["difference"]:
            found.append(row)
    return found[::-1]


def frontier_figure(rows: Sequence[Row]) -> Figure:
    """Draw the differences in entropy and in expected reward from the run as it is, of the last checkpoint.

    Args:
        rows: of `interventions.parquet`, of one normalisation; some of them measured with rewards.

    Returns:
        Points with the intervals of both differences, a line through those that none of the others beats, and their
        names. The run as it is lies where the axes cross.
    """
    checkpoint, group = list(with_rewards(rows).items())[-1]
    fonts = glyphs.families("".join(row["checkpoint"] + row["intervention"] for row in group))
    with matplotlib.rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes: Axes = figure.subplots()
        best = undominated(group)
        others = [row for row in group if row not in best]
        for of, colour, label in ((others, GREY, "beaten in both by another"), (best, BLUE, "beaten by none")):
            _points(axes, of, colour, label)
        axes.plot(*_places(best), color=BLUE, linewidth=0.8)
        axes.axhline(0.0, color=BLACK, linewidth=0.6)
        axes.axvline(0.0, color=BLACK, linewidth=0.6)
        for row in best[:: max(1, -(-len(best) // NAMED))]:
            at = (row["difference_j"], row["difference"])
            axes.annotate(short(row["intervention"], fonts), at, (4, 4), textcoords="offset points", fontsize=7)
        of_reward, of_entropy = _places(group)
        unit = in_units(axes.yaxis, of_entropy, unit_of(rows[0]["normalization"]))
        axes.set_ylabel(f"entropy kept: ΔH minus that of the run [{unit}]")
        axes.set_xlabel(f"reward gained: ΔJ minus that of the run [{in_units(axes.xaxis, of_reward, 'reward')}]")
        axes.set_title(short(checkpoint, fonts), fontsize=9)
        axes.margins(0.12)
        legend_below(figure, [axes], 2)
    return figure


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["difference_j"] for row in rows], [row["difference"] for row in rows]


def _points(axes: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
    if not rows:
        return
    of_reward, of_entropy = _places(rows)
    entropy_ends = [{f"e_{end}": row[end] for end in ("low", "high")} for row in rows]
    axes.errorbar(
        of_reward,
        of_entropy,
        xerr=half_widths(rows, "difference_j"),
        yerr=half_widths(entropy_ends, "e"),
        fmt="o",
        color=colour,
        elinewidth=0.7,
        label=label,
    )
