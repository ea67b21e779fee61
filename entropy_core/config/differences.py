"""In which settings two configurations differ, for people."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_NO_RESULT = ("execution", "name")
"""Keys on which no number depends."""


class Differing(NamedTuple):
    """A setting by its dotted key, and its values; None where a configuration does not have it."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        """The last part of the key with the new value, as a user would say it."""
        return f"{self.key.rpartition('.')[2]} {in_words(self.after)}"


def differing_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Differing]:
    """List the settings in which two configurations differ, in the order of the second.

    Args:
        before: a configuration as plain values.
        after: another one.

    Returns:
        The settings that can change a number; not the name, and not how the work was done.
    """
    was, now = dict(_leaves(before)), dict(_leaves(after))
    keys = [key for key in {**now, **was} if key.partition(".")[0] not in _NO_RESULT]
    return [Differing(key, was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)]


def in_words(value: Any) -> str:
    """Show the value of a setting in a few words; the value of a path is its last part."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {in_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value)) or "none"
    if isinstance(value, str):
        return value.rpartition("/")[2] if value.startswith("/") else value or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value and not prefix:
            yield from _leaves(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value
