"""Figure of the tokens of U that change the entropy most, in context, coloured by their contributions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from entropy_core.estimates.tables import Row

ROWS_PER_SIGN = 4
LONGEST_LINE = 64  # characters of context
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
        prompt = _visible(sequence["prompt"][-40:])
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

    Args:
        figure: an empty figure.
        shown: passages from `passages`.
        title: title of the figure.
        unit: unit of the shares.
    """
    figure.set_size_inches(7.2, 0.9 + 0.52 * max(len(shown), 1))
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_axis_off()
    axes.set(xlim=(0, LONGEST_LINE), ylim=(-2.0 * max(len(shown), 1), 0.2))
    largest = max((abs(share) for passage in shown for share in passage.shares), default=0.0) or 1.0
    for number, passage in enumerate(shown):
        axes.text(0, -2.0 * number - 0.15, passage.title, fontsize=7, va="top", color="dimgray", parse_math=False)
        _line(axes, passage, -2.0 * number - 1.55, largest)
    scale = figure.colorbar(_scale(largest), ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=50)
    scale.set_label(f"contribution to δH₁/η [{unit}]; red lowers the entropy", fontsize=8)
    scale.ax.tick_params(labelsize=7)


def _line(axes: Axes, passage: Passage, y: float, largest: float) -> None:
    x = 0.0
    for text, share in zip(passage.texts, passage.shares, strict=True):
        colour = colormaps[COLOURS](0.5 + 0.5 * share / largest)
        axes.add_patch(Rectangle((x, y), len(text), 0.9, facecolor=colour, edgecolor="white", linewidth=0.5))
        for offset, character in enumerate(text):
            drawn = axes.text(
                x + offset + 0.5, y + 0.4, character, fontsize=8, family="monospace", ha="center", va="center",
                parse_math=False, color="white" if abs(share) > 0.7 * largest else "black",
            )  # fmt: skip
            drawn.set_in_layout(False)  # it is within the axes, and hundreds like it take long to measure
        x += len(text)


def _scale(largest: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-largest, largest), COLOURS)


def _window(whole: Sequence[Row], position: int) -> tuple[int, int]:
    """Return the range of tokens around `position` that fits on one line."""
    start = stop = position
    room = LONGEST_LINE - len(_visible(whole[position]["text"]))
    while room > 0 and (start > 0 or stop + 1 < len(whole)):
        grew = False
        for side in ("before", "after"):
            index = start - 1 if side == "before" else stop + 1
            if 0 <= index < len(whole) and len(_visible(whole[index]["text"])) <= room:
                room -= len(_visible(whole[index]["text"]))
                start, stop, grew = min(start, index), max(stop, index), True
        if not grew:
            break
    return start, stop + 1


def _visible(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "→").replace("\r", "")[:LONGEST_LINE] or "∅"
    return "".join(character if character.isprintable() else "·" for character in text)
