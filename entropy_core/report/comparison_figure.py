"""The figure of a comparison: entropy, predicted change and its difference along the training, a curve per run."""

from collections.abc import Mapping, Sequence
from itertools import chain, cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropy_core.estimates.selection import Row, at_learning_rate, best_prediction, first_of_each, interval_of, unit_of
from entropy_core.numerics.uncertainty import normal_quantile
from entropy_core.report import glyphs
from entropy_core.report.drawing import STYLE, in_units, short

_MARKS = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:", "*-.")
"""Curves differ in shape and line, not in colour alone."""
_COLOURS = tuple(f"C{i}" for i in range(10))


def comparison_figure(series: Mapping[str, Sequence[Row]], compared: Sequence[Row] = ()) -> Figure:
    """Draw H, the predicted change and the difference of δH₁ against the training step.

    Args:
        series: rows of the result table by the name of a run, or of a run directory in it.
        compared: rows of `tables.COMPARISON`.

    Returns:
        A panel each, for the first normalisation that all have; none for differences where there are none.
    """
    normalization = _common_normalization(series)
    unit = unit_of(normalization)
    shown = {name: [row for row in rows if row["normalization"] == normalization] for name, rows in series.items()}
    at_lr = {name: first_of_each(at_learning_rate(rows)) for name, rows in shown.items()}
    of_h1 = [row for row in compared if (row["normalization"], row["quantity"]) == (normalization, "delta_h1")]
    known = all(row[f"{interval_of(best_prediction(row), 'next')}_low"] is not None for row in chain(*at_lr.values()))
    update = "next" if known else "this"
    fonts = glyphs.families("".join(series))
    with matplotlib.rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(6.4, 7.4 if of_h1 else 5.4), layout="constrained")
        above, middle, *below = figure.subplots(3 if of_h1 else 2, 1, sharex=True)
        for name, mark, colour in zip(shown, cycle(_MARKS), cycle(_COLOURS)):
            first = first_of_each(shown[name])
            reach = [normal_quantile(row["confidence_level"]) * row["H_se"] for row in first]
            _curve(above, first, [row["H"] for row in first], reach, mark, colour)
            best = [best_prediction(row) for row in at_lr[name]]
            values = [row[column] for row, column in zip(at_lr[name], best, strict=True)]
            reach = [_reach(row, interval_of(of, update)) for row, of in zip(at_lr[name], best, strict=True)]
            _curve(middle, at_lr[name], values, reach, mark, colour)
            above.plot([], [], mark, color=colour, markersize=4, linewidth=1, label=short(name, fonts))
            differences = [row for row in of_h1 if row["other_run"] == name and row["difference"] is not None]
            reach = [_reach(row, "this_update") for row in differences]
            for axes in below:
                _curve(axes, differences, [row["difference"] for row in differences], reach, mark, colour)
        entropies = [row["H"] for rows in shown.values() for row in rows]
        predicted = [row[best_prediction(row)] for row in chain(*at_lr.values())]
        apart = [row["difference"] for row in of_h1 if row["difference"] is not None]
        above.set_title("Entropy, and its predicted change by the next step")
        above.set_ylabel(f"H [{in_units(above.yaxis, entropies, unit)}]")
        middle.set_ylabel(f"predicted change, {update} update\n[{in_units(middle.yaxis, predicted, unit)}]")
        middle.axhline(0, color="black", linewidth=0.8)
        for axes in below:
            axes.set_ylabel(f"difference of δH₁\nfrom the first [{in_units(axes.yaxis, apart, unit)}]")
            axes.axhline(0, color="black", linewidth=0.8)
        last = below[0] if below else middle
        last.set_xlabel("training step")
        last.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _common_normalization(series: Mapping[str, Sequence[Row]]) -> str:
    first, *others = ({row["normalization"]: None for row in rows} for rows in series.values())
    return next((name for name in first if all(name in names for names in others)), next(iter(first)))


def _curve(
    axes: Axes, rows: Sequence[Row], values: Sequence[float], reach: Sequence[float], mark: str, colour: str
) -> None:
    steps = [row["step"] for row in rows]
    axes.errorbar(steps, values, yerr=reach, fmt=mark, color=colour, markersize=4, capsize=2, linewidth=1)


def _reach(row: Row, interval: str) -> float:
    """Half the width of an interval; 0 where there is none."""
    low, high = row[f"{interval}_low"], row[f"{interval}_high"]
    return 0.0 if low is None else (high - low) / 2
