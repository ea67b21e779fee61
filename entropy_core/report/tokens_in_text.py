"""Figure of the tokens of U that change the entropy most, in context, coloured by their contributions."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from entropy_core.estimates.selection import Row
from entropy_core.report import glyphs
from entropy_core.report.drawing import in_units

ROWS_PER_SIGN = 4
LONGEST_LINE = 88  # columns of a monospaced font
LONGEST_PROMPT, LONGEST_TITLE = 64, 72  # columns, too
WIDTH, SIDE, ABOVE, LINE, BELOW = 7.2, 0.1, 0.32, 0.42, 0.62  # inches, LINE for both lines of a passage
SIZE = 8.5  # points: a column is as wide as one of its characters, and a little wider
COLOURS = "RdBu"  # red lowers the entropy


class Passage(NamedTuple):
    """One token in context: a title, the texts of the tokens shown, and their shares in the entropy change."""

    title: str
    texts: tuple[str, ...]
    shares: tuple[float, ...]


def passages(tokens: Sequence[Row], sequences: Sequence[Row], column: str) -> list[Passage]:
    """Select the tokens that lower and raise the entropy most, at most one per sequence, with their context.

    Args:
        tokens: rows of `tokens.parquet` of first-order-u, in order.
        sequences: rows of `sequences.parquet` of first-order-u.
        column: column of the share to rank by.

    Returns:
        Up to `ROWS_PER_SIGN` passages that lower the entropy, then as many that raise it, strongest first.
    """
    of_sequence = {row["sequence_id"]: row for row in sequences}
    by_sequence: dict[int, list[Row]] = {}
    for token in tokens:
        by_sequence.setdefault(token["sequence_id"], []).append(token)
    ranked = sorted(tokens, key=lambda token: token[column])
    lowering = _one_of_each([token for token in ranked if token[column] < 0], set())
    taken = {token["sequence_id"] for token in lowering}
    raising = _one_of_each([token for token in reversed(ranked) if token[column] > 0], taken)
    shown = []
    for token in [*lowering, *raising]:
        whole, sequence = by_sequence[token["sequence_id"]], of_sequence[token["sequence_id"]]
        start, stop = _window(whole, token["position"])
        prompt = glyphs.cut(_in_one_line(sequence["prompt"]), LONGEST_PROMPT, "end")
        reward = "no reward" if sequence["reward"] is None else f"reward {sequence['reward']:g}"
        title = f"{prompt}   {reward}, A {sequence['advantage']:+.2f}"
        around = whole[start:stop]
        shown.append(Passage(title, tuple(_visible(t["text"]) for t in around), tuple(t[column] for t in around)))
    return shown


def _one_of_each(ranked: Sequence[Row], taken: set[int]) -> list[Row]:
    """Return the first `ROWS_PER_SIGN` tokens of a ranking, one per sequence, from sequences not in `taken`."""
    chosen: dict[int, Row] = {}
    for token in ranked:
        if token["sequence_id"] not in taken and len(chosen) < ROWS_PER_SIGN:
            chosen.setdefault(token["sequence_id"], token)
    return list(chosen.values())


def draw(figure: Figure, shown: Sequence[Passage], title: str, unit: str) -> None:
    """Draw passages as lines of text on a coloured background.

    What lowers the entropy is red and has a bar below it, what raises it is blue and has a bar above it.

    Args:
        figure: an empty figure.
        shown: passages from `passages`.
        title: title of the figure.
        unit: unit of the shares.
    """
    text = "".join([title, *(part for passage in shown for part in (passage.title, *passage.texts))])
    fonts, of_tokens = glyphs.families(text), glyphs.families(text, glyphs.TOKENS)
    height = ABOVE + LINE * max(len(shown), 1) + BELOW
    figure.set_size_inches(WIDTH, height)
    axes = figure.add_axes((SIDE / WIDTH, BELOW / height, 1 - 2 * SIDE / WIDTH, 1 - (ABOVE + BELOW) / height))
    axes.set_axis_off()
    axes.set(xlim=(0, LONGEST_LINE), ylim=(-2.0 * max(len(shown), 1), 0.0))
    axes.set_title(glyphs.cut(glyphs.drawable(title, fonts), LONGEST_TITLE, "both"), family=fonts)
    largest = max((abs(share) for passage in shown for share in passage.shares), default=0.0) or 1.0
    for number, passage in enumerate(shown):
        said = glyphs.drawable(passage.title, fonts)
        axes.text(0, -2.0 * number - 0.9, said, fontsize=7, va="bottom", color="dimgray", family=fonts)
        _line(axes, passage, -2.0 * number - 1.8, largest, of_tokens)
    if not shown:
        axes.text(LONGEST_LINE / 2, -1, "No token changes the entropy.", ha="center", va="center", color="dimgray")
    scale = figure.add_axes((0.15, 0.42 / height, 0.7, 0.09 / height))
    bar = figure.colorbar(_scale(largest), cax=scale, orientation="horizontal")
    per = in_units(bar.ax.xaxis, [largest], unit)
    note = f"; {glyphs.MISSING}: no font here has it" if glyphs.lacking(text, of_tokens) else ""
    bar.set_label(f"contribution to δH₁/η [{per}]; red, bar below: lowers the entropy{note}", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _line(axes: Axes, passage: Passage, y: float, largest: float, fonts: list[str]) -> None:
    x, column, colours = 0.0, (WIDTH - 2 * SIDE) * 72 / LONGEST_LINE, colormaps[COLOURS]
    for text, share in zip(passage.texts, passage.shares, strict=True):
        room = glyphs.cells(text)
        colour = colours(0.5 + 0.5 * share / largest)
        # `add_patch` would first see how far the data reach, which takes longer than to draw them
        axes.add_artist(Rectangle((x, y), room, 0.9, facecolor=colour, edgecolor="white", linewidth=0.5))
        if share:
            bar = 0.16 * abs(share) / largest
            axes.add_artist(Rectangle((x, y if share < 0 else y + 0.9 - bar), room, bar, color="black", linewidth=0))
        seen = glyphs.drawable(text, fonts)
        fits = SIZE if text.isascii() else SIZE * min(1.0, room * column / (glyphs.width(seen, fonts, SIZE) or 1.0))
        axes.text(
            x + room / 2, y + 0.44, seen, fontsize=fits, family=fonts, ha="center", va="center_baseline",
            color="white" if abs(share) > 0.7 * largest else "black",
        )  # fmt: skip
        x += room


def _scale(largest: float) -> ScalarMappable:
    return ScalarMappable(Normalize(-largest, largest), COLOURS)


def _window(whole: Sequence[Row], position: int) -> tuple[int, int]:
    """Return the range of tokens around `position` that fits on one line."""
    start = stop = position
    room = LONGEST_LINE - glyphs.cells(_visible(whole[position]["text"]))
    while room > 0 and (start > 0 or stop + 1 < len(whole)):
        grew = False
        for side in ("before", "after"):
            index = start - 1 if side == "before" else stop + 1
            if 0 <= index < len(whole) and glyphs.cells(_visible(whole[index]["text"])) <= room:
                room -= glyphs.cells(_visible(whole[index]["text"]))
                start, stop, grew = min(start, index), max(stop, index), True
        if not grew:
            break
    return start, stop + 1


def _visible(text: str) -> str:
    """A token as it is drawn: whole, if it fits on a line, and at least one column wide."""
    seen = glyphs.cut(_in_one_line(text), LONGEST_LINE)
    return seen if glyphs.cells(seen) else f"·{seen}" if seen else "∅"


def _in_one_line(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "→").replace("\r", "")
    return "".join(character if character.isprintable() else "·" for character in text)
