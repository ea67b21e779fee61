"""How every figure looks: colours that survive greyscale and colour blindness, units at the axes, legends outside.

What distinguishes two series is never the colour alone: a few checkpoints have a marker each, many of them one colour
scale that goes from dark to light, and estimators have both a colour and a marker.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator

from entropy_core.estimates.selection import Row
from entropy_core.report import glyphs

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "font.family": list(glyphs.TEXT),
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # right above the axes: nothing is ever there, and to look for it takes a tenth of the drawing
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.0,
    "errorbar.capsize": 2.0,
    "text.parse_math": False,  # the name of a checkpoint may contain dollar signs
    "svg.hashsalt": "entropy-probe",  # otherwise element ids, and so the file's digest, would be random
}

FEW = 6
"""Up to so many checkpoints are told apart by name; more of them by a colour scale along the training."""

MARKERS = ("o", "s", "^", "D", "v", "P")
LONGEST_NAME = 24  # columns; three of them fit side by side

BLACK, BLUE, ORANGE, GREY = "black", "#0072b2", "#d55e00", "0.45"  # of Okabe and Ito, with unlike lightness

BY_STEP = LinearSegmentedColormap.from_list("by step", colormaps["cividis"](range(0, 225)))  # none too light for paper


class Look(NamedTuple):
    """How the points of one checkpoint are drawn."""

    color: Any
    marker: str


class Training:
    """The checkpoints of a sweep, in the order of their steps, and how each of them is drawn.

    Args:
        rows: with `checkpoint` and `step`, at least one.

    Attributes:
        few: whether each has a name and a marker; otherwise a colour scale tells them apart.
        fonts: families that have the characters of their names.
        looks: by checkpoint.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        steps = {row["checkpoint"]: row["step"] for row in rows}
        names = sorted(steps, key=lambda name: steps[name])
        self.few = len(names) <= FEW
        self.fonts = glyphs.families("".join(names))
        self._scale = Normalize(steps[names[0]], steps[names[-1]])
        self.looks = {
            name: Look(BY_STEP(k / max(len(names) - 1, 1)), MARKERS[k])
            if self.few
            else Look(BY_STEP(float(self._scale(steps[name]))), "o")
            for k, name in enumerate(names)
        }

    def name(self, checkpoint: str) -> str:
        """The name of a checkpoint as it fits into a legend."""
        return short(checkpoint, self.fonts)

    def add_key(self, figure: Figure, axes: Sequence[Axes]) -> None:
        """Add the colour scale, if the checkpoints are told apart by it."""
        if not self.few:
            bar = figure.colorbar(ScalarMappable(self._scale, BY_STEP), ax=list(axes), pad=0.02, aspect=30)
            bar.set_label("training step")
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar.outline.set_visible(False)


def short(name: str, fonts: list[str]) -> str:
    """A name cut to what fits above a panel or into a legend."""
    return glyphs.cut(glyphs.drawable(name, fonts), LONGEST_NAME, "both")


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """Put one legend for all of the axes below them, where no data are."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def in_units(axis: Axis, values: Sequence[float], unit: str) -> str:
    """Label the ticks in the power of ten that suits the values, without an offset in a corner.

    Args:
        axis: of the values.
        values: what is drawn along it.
        unit: of the values.

    Returns:
        The unit for the label of the axis, such as `10⁻³ nats per token`.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    power = 0 if largest == 0 or 0.01 <= largest < 1e4 else 3 * math.floor(math.log10(largest) / 3)
    factor = 10.0**power

    axis.set_major_formatter(_Scaled(factor))
    return f"10{str(power).translate(_RAISED)} {unit}" if power else unit


class _Scaled(Formatter):
    """Ticks divided by a factor, with as many digits as tell them apart."""

    def __init__(self, factor: float) -> None:
        self._factor, self._digits = factor, 0

    def set_locs(self, locs: list[float]) -> None:
        """Take note of all the ticks that will be labelled."""
        super().set_locs(locs)
        between = abs(locs[1] - locs[0]) / self._factor if len(locs) > 1 else 1.0
        close = (n for n in range(12) if math.isclose(round(between, n), between, rel_tol=1e-6))
        self._digits = next(close, 12)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x / self._factor + 0.0:.{self._digits}f}".replace("-", "−")


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def half_widths(rows: Sequence[Row], interval: str) -> list[list[float]]:
    """Distances from values to the ends of their intervals; NaN, which is not drawn, where there is none."""
    half = [(number(row[f"{interval}_high"]) - number(row[f"{interval}_low"])) / 2 for row in rows]
    return [half, half]


def number(value: float | None) -> float:
    """NaN, which is not drawn, for what is missing."""
    return math.nan if value is None else value


def say_nothing_measured(axes: Axes, what: str) -> None:
    """Write into empty axes why there is nothing in them."""
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=8, wrap=True)
    axes.set(xticks=[], yticks=[])
