"""The section of the report that says what would change the entropy, and how sure that is."""

from collections.abc import Mapping, Sequence
from statistics import median

from entropy_core.estimates.selection import Row, by_checkpoint
from entropy_core.report.markdown import markdown_rows

LEVELS = ("screen", "predict", "measure")
SHOWN = 8
"""Interventions in the table of a checkpoint, at most."""


def deepest(rows: Sequence[Row]) -> list[Row]:
    """Select, of one checkpoint, the exact steps if they were taken, else the screen; by falling difference."""
    levels = {row["level"] for row in rows}
    return [row for row in rows if row["level"] == ("predict" if "predict" in levels else "screen")]


def section(rows: Sequence[Row], skipped: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """Return the section on interventions.

    Args:
        rows: of `interventions.parquet`, of one normalisation.
        skipped: by checkpoint what could not be tried, and why.

    Returns:
        Lines of markdown; none without rows.
    """
    if not rows:
        return []
    lines = []
    for checkpoint, group in by_checkpoint(rows).items():
        lines += [f"- **{checkpoint}**: {sentence}" for sentence in _sentences(group)]
    lines += ["", "![what each intervention changes](interventions.png)", ""]
    measured = [row for row in rows if row["level"] == "measure" and row["verdict"] != "as it is"]
    if any(row["difference_j"] is not None for row in measured):
        lines += ["![entropy kept against reward gained](frontier.png)", ""]
    for checkpoint, group in by_checkpoint(rows).items():
        lines += [f"{checkpoint}:", "", *_table(group), ""]
    lines += [
        "Every intervention is tried on the same E and the same U as the run as it is, so that the difference of the "
        "two changes of the entropy has little noise. Its interval is for the mean update: over E and over U. *Acts*: "
        "p, adjusted by Holm for the number of interventions, is at most the level. *Does not act*: the difference is "
        "surely smaller than the margin, be it zero or not. *Cannot tell*: neither; E and U of this size detect "
        "the difference in the last column with probability 80 %. *Kept on* is the difference a step once the "
        "momentum is that of the changed gradient, at the denominators of the run. The best are selected by one half "
        "of E; the other half judges them.",
    ]
    reasons = {(one["intervention"], one["reason"]) for of_one in skipped.values() for one in of_one}
    if reasons:
        lines += ["", "Not tried: " + "; ".join(f"`{name}` ({reason})" for name, reason in sorted(reasons)) + "."]
    return lines


def sentence(rows: Sequence[Row]) -> str:
    """Say what would change the step of the last checkpoint most, upwards, and what it does to the expected reward.

    Args:
        rows: of `interventions.parquet`, of one normalisation.

    Returns:
        One sentence without markup; empty without rows.
    """
    if not rows:
        return ""
    *_, group = by_checkpoint(rows).values()
    shown = deepest(group)
    run = next(row for row in shown if row["verdict"] == "as it is")
    acting = [row for row in shown if row["verdict"] == "acts"]
    raising = [row for row in acting if row["difference"] > 0]
    start = f"Of {len(shown) - 1} interventions tried at {run['checkpoint']}, {len(acting)} surely act"
    if not raising:
        return f"{start}, and none of them keeps entropy."
    best = raising[0]
    share = f" ({best['difference'] / abs(run['delta_h1']):+.0%} of the step)" if run["delta_h1"] else ""
    kept = f"{best['difference']:+.2g} {_span(best, '')} a step{share}"
    text = f"{start}; {best['intervention']} keeps most entropy, {kept}"
    measured = [row for row in group if row["level"] == "measure" and row["intervention"] == best["intervention"]]
    if not measured or measured[0]["difference_j"] is None:
        return f"{text}."
    reward = measured[0]
    return f"{text}, and changes the expected reward by {reward['difference_j']:+.2g} {_span(reward, 'difference_j_')}."


def _sentences(group: Sequence[Row]) -> list[str]:
    """What a reader wants to know first: what acts most, what does not, what cannot be told."""
    rows = deepest(group)
    run = next(row for row in rows if row["verdict"] == "as it is")
    tried = [row for row in rows if row is not run]
    acting = [row for row in tried if row["verdict"] == "acts"]
    unknown = [row for row in tried if row["verdict"] == "cannot tell"]
    idle = len(tried) - len(acting) - len(unknown)
    start = f"the step changes the entropy by δH₁ = {run['delta_h1']:+.3g}. Of {len(tried)} interventions, "
    start += f"{len(acting)} act{'s' if len(acting) == 1 else ''}"
    if acting:
        ends = [acting[0]] if len(acting) == 1 or acting[0] is acting[-1] else [acting[0], acting[-1]]
        start += ", most of all " + " and ".join(_effect(row, run, group) for row in ends)
    found = [f"{start}; {idle} {'does' if idle == 1 else 'do'} not act, and of {len(unknown)} it cannot be told."]
    detectable = [row["detectable"] for row in unknown if row["detectable"] is not None]
    if detectable:
        found.append(
            f"of those that cannot be told, half would have to change δH₁ by {median(detectable):.2g} or more to be "
            "seen; a larger U, or a larger E, sees less."
        )
    return found


def _effect(row: Row, run: Row, group: Sequence[Row]) -> str:
    share = f", {row['difference'] / abs(run['delta_h1']):+.0%} of it" if run["delta_h1"] else ""
    text = f"`{row['intervention']}` by {row['difference']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]{share}"
    for other in group:
        if other["level"] == "measure" and other["intervention"] == row["intervention"]:
            text += f" (measured: {other['difference']:+.3g} {_span(other, '')}{_with_reward(other)})"
    return text


def _with_reward(row: Row) -> str:
    if row["difference_j"] is None:
        return ""
    return f"; expected reward: {row['difference_j']:+.2g} {_span(row, 'difference_j_')}"


def _span(row: Row, prefix: str) -> str:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    return "–" if low is None else f"[{low:+.2g}, {high:+.2g}]"


def _table(group: Sequence[Row]) -> list[str]:
    rows = deepest(group)
    if len(rows) > SHOWN:  # both ends of the ranking, and the run between them
        run = next(i for i, row in enumerate(rows) if row["verdict"] == "as it is")
        first = rows[: min(run, SHOWN // 2)]
        last = rows[max(run + 1, len(rows) - SHOWN // 2) :]
        rows = [*first, rows[run], *last]
    measured = {row["intervention"]: row for row in group if row["level"] == "measure"}
    rewarded = any(row["difference_j"] is not None for row in measured.values())
    foretold = {row["intervention"]: row["difference_j"] for row in rows if row["level"] == "predict"}
    predicted = any(value is not None for value in foretold.values())
    body = []
    for row in rows:
        name = row["intervention"]
        cells = (
            row["delta_h1"],
            row["difference"],
            measured.get(name, {}).get("difference"),
            row["kept_on_difference"],
        )
        delta_h1, difference, of_measured, kept = ("–" if x is None else f"{x:+.3g}" for x in cells)
        p_holm = "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        detectable = "–" if row["detectable"] is None else f"{row['detectable']:.2g}"
        of_reward = ["–" if foretold.get(name) is None else f"{foretold[name]:+.2g}"] if predicted else []
        of_reward += [_reward_cell(measured.get(name))] if rewarded else []
        begin = (f"`{name}`", delta_h1, difference, _span(row, ""), of_measured, *of_reward)
        body.append((*begin, kept, p_holm, row["verdict"], detectable))
    head = ["intervention", "δH₁", "difference", "interval", "of ΔH"]
    head += ["of δJ₁"] * predicted + ["of ΔJ"] * rewarded
    return markdown_rows((*head, "kept on", "p (Holm)", "verdict", "detectable"), body)


def _reward_cell(row: Row | None) -> str:
    if row is None or row["difference_j"] is None:
        return "–"
    return f"{row['difference_j']:+.2g} {_span(row, 'difference_j_')}"
