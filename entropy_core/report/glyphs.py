"""Which fonts draw a text, whatever script it is in.

A figure is drawn with matplotlib's own font, and for other scripts with fonts of the machine. A character that none of
them has is drawn as `MISSING`, so that a reader sees that something is there.
"""

import unicodedata
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.textpath import text_to_path

TEXT = ("DejaVu Sans",)
TOKENS = ("DejaVu Sans Mono", "DejaVu Sans")
MISSING = "□"


def families(text: str, base: tuple[str, ...] = TEXT) -> list[str]:
    """Choose the fonts for a text.

    Args:
        text: all that is to be drawn.
        base: families to prefer, which matplotlib brings along.

    Returns:
        The families of `base`, then one after the other those that add most of the characters still missing.
    """
    chosen = list(base)
    left = set(map(ord, text)) - _characters_of(base)
    while left:
        best = max(_others(), key=lambda family: len(left & _characters(family)), default="")
        if not best or not left & _characters(best):
            break
        chosen.append(best)
        left -= _characters(best)
    return chosen


def drawable(text: str, fonts: list[str]) -> str:
    """Replace what none of these families has by `MISSING`, and what is no character of a line by `·`."""
    known = _characters_of(tuple(fonts))
    printable = (character if character.isprintable() else "·" for character in text)
    return "".join(character if ord(character) in known else MISSING for character in printable)


def lacking(text: str, fonts: list[str]) -> bool:
    """Whether a part of the text is drawn as `MISSING`."""
    return drawable(text, fonts).count(MISSING) > text.count(MISSING)


def cells(text: str) -> int:
    """How many columns a text takes in a monospaced font: two for a CJK character, none for a combining mark."""
    return sum(_columns(character) for character in text)


def cut(text: str, columns: int, keep: str = "start") -> str:
    """Cut a text to a number of columns, with an ellipsis for what is left out.

    Args:
        text: the text.
        columns: see `cells`.
        keep: what is left of it: its start, its end, or both.

    Returns:
        The text, if it is not longer.
    """
    if cells(text) <= columns:
        return text
    before = {"start": columns - 1, "end": 0, "both": columns // 2}[keep]
    head, tail = _first(text, before), _first(text[::-1], columns - 1 - before)[::-1]
    return f"{head}…{tail}"


def width(text: str, fonts: list[str], size: float) -> float:
    """The width of a line, in points."""
    return float(text_to_path.get_text_width_height_descent(text, FontProperties(family=fonts, size=size), False)[0])


def _first(text: str, columns: int) -> str:
    taken = 0
    for index, character in enumerate(text):
        taken += _columns(character)
        if taken > columns:
            return text[:index]
    return text


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@cache
def _characters(family: str) -> frozenset[int]:
    path = findfont(FontProperties(family=[family]), fallback_to_default=False)
    return frozenset(get_font(path).get_charmap())


@cache
def _characters_of(families: tuple[str, ...]) -> frozenset[int]:
    return frozenset().union(*map(_characters, families))


@cache
def _others() -> tuple[str, ...]:
    """Upright fonts of the machine; the one of matplotlib that draws a box for every character is no font for it."""
    return tuple(
        sorted(
            {
                font.name
                for font in fontManager.ttflist
                if font.style == "normal" and not font.name.startswith(("Last Resort", "STIX", "cm"))
            }
        )
    )
