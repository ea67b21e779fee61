"""The section of docs/benchmarks.md for GPUs, made of what the check of a device wrote."""

from collections.abc import Mapping
from typing import Any

NOTHING = [
    "## On a GPU",
    "",
    "Nothing has been measured on a GPU yet. `make check-device` says in at most eight minutes whether the numbers of",
    "the device at hand are right, how fast every pass is, and what fits. With `OUT=docs/device.json` it writes, on a",
    "GPU, what `make bench` makes the tables of that belong here. A small form of the check is a part of `make test`.",
]


def section(found: Mapping[str, Any] | None) -> list[str]:
    """Lines of Markdown.

    Args:
        found: the JSON of the check on a GPU; None where there is none.

    Returns:
        The section, which says so where nothing was measured.
    """
    if found is None:
        return NOTHING
    said = ", ".join(f"{name} {value}" for name, value in found["setting"].items() if value)
    lines = ["## On a GPU", "", f"Written by `make check-device` in {found['seconds']:.0f} s: {said}.", ""]
    lines += [_verdict(found), ""]
    for title, rows in (
        ("Against the CPU", found["right"]),
        ("Long answers, one at a time", found.get("long", [])),
        ("Speed", found["fast"]),
        ("Memory", [row for row in found["fits"] if "ratio" in row]),
        ("What fits, by the formulas", [row for row in found["fits"] if "largest_model" in row]),
    ):
        rows = [{name: value for name, value in row.items() if name != "traceback"} for row in rows]
        if rows:
            lines += [f"### {title}", "", *_table(rows), ""]
    for of_pass in found.get("profile", []):
        lines += [f"### Where the time goes: {of_pass['what']}", "", "```text", *of_pass["lines"], "```", ""]
    return lines[:-1]


def _verdict(found: Mapping[str, Any]) -> str:
    if not found["finished"]:
        return "**The check was cut off**: what follows is what it had found by then."
    if found["failed"]:
        return f"**Missed their tolerance**: {'; '.join(found['failed'])}."
    return "All numbers are within their tolerances."


def _table(rows: list[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'|'.join('---' for _ in names)}|"]
    return head + [f"| {' | '.join(_shown(row.get(name)) for name in names)} |" for row in rows]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
