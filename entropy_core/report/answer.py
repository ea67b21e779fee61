"""The first paragraph of a report: is the entropy falling, how fast, what does it, does the prediction hold, what next.

Plain sentences from the rows at the step size closest to the learning rate, one row per checkpoint. Every sentence is
about a number that the tables below it hold.
"""

from collections.abc import Sequence

from entropy_core.estimates.selection import Row, at_learning_rate, best_prediction, first_of_each, interval_of
from entropy_core.report import interventions, phase, price, rehearsal

FLAT = 1e-3
"""A change is small if its whole interval is within this part of H."""

_DIRECTIONS = {"negative": "lowers", "positive": "raises"}
_SOURCES = {
    "batch": "this batch's gradient",
    "delta_h1_momentum": "the momentum of earlier batches",
    "delta_h1_decay": "weight decay",
    "delta_h1_rounding": "the rounding of the weights",
}


def answer(
    rows: Sequence[Row],
    unlike_the_run: bool = False,
    prices: Sequence[Row] = (),
    tried: Sequence[Row] = (),
    along: Sequence[Row] = (),
    rehearsed: Sequence[Row] = (),
) -> str:
    """Answer in words what a sweep was run for.

    Args:
        rows: rows of the result table, of one normalisation.
        unlike_the_run: whether what the trainer logged disagrees with what the probe measures.
        prices: rows of `price.parquet`, of the same normalisation.
        tried: rows of `interventions.parquet`, of the same normalisation.
        along: rows of `phase.parquet`, of the same normalisation.
        rehearsed: rows of `rehearsal.parquet`, of the same normalisation.

    Returns:
        One paragraph, as markdown without markup.
    """
    at_lr = first_of_each(at_learning_rate(rows))
    said = ["These numbers may be of another run: read the warning above first."] if unlike_the_run else []
    if not at_lr or not any(row["eta"] for row in at_lr):
        return " ".join([*said, "No step size but 0 was asked for, so nothing is said of a step."])
    said += [
        *_direction(at_lr),
        _speed(at_lr),
        _source(at_lr[-1]),
        _shape(at_lr),
        phase.sentence(along),
        price.sentence(prices),
        interventions.sentence(tried),
        rehearsal.sentence(rehearsed),
        *_next(at_lr),
    ]
    return " ".join(filter(None, said))


def _direction(rows: Sequence[Row]) -> list[str]:
    """Which way the step takes the entropy, over the checkpoints."""
    by_sign: dict[str, list[Row]] = {}
    for row in rows:
        by_sign.setdefault(_sign(row), []).append(row)
    if len(rows) == 1:
        return [{**_ONE, "unknown": _cannot_tell(rows)}[_sign(rows[0])]]
    if len(by_sign) == 1:
        [sign] = by_sign
        return [{**_ALL, "unknown": _cannot_tell(rows)}[sign].format(n=len(rows))]
    parts = [
        f"{text} at {_names(by_sign[sign])}"
        for sign, text in (("negative", "falls"), ("positive", "rises"), ("flat", "hardly moves"))
        if sign in by_sign
    ]
    unknown = [f"At {_names(by_sign['unknown'])} the sign cannot be told."] if "unknown" in by_sign else []
    return [f"In a step at the learning rate, the entropy {', '.join(parts)}.", *unknown]


_ONE = {
    "negative": "The entropy is falling: this step lowers it.",
    "positive": "The entropy is rising: this step raises it.",
    "flat": f"The entropy hardly moves: this step changes it by less than {FLAT:.1%} of itself.",
}
_ALL = {
    "negative": "The entropy is falling: at each of the {n} checkpoints a step lowers it.",
    "positive": "The entropy is rising: at each of the {n} checkpoints a step raises it.",
    "flat": f"The entropy hardly moves: at each of the {{n}} checkpoints a step changes it by less than {FLAT:.1%}.",
}


def _sign(row: Row) -> str:
    """The sign of the predicted change for this update, `flat` where all of its interval is small, or `unknown`."""
    prefix = interval_of(best_prediction(row), "this")
    low, high = row[f"{prefix}_low"], row[f"{prefix}_high"]
    if low is None:
        return "unknown"
    if row["H"] and max(abs(low), abs(high)) < FLAT * row["H"]:
        return "flat"
    return "negative" if high < 0 else "positive" if low > 0 else "unknown"


def _cannot_tell(rows: Sequence[Row]) -> str:
    row = rows[-1]
    prefix = interval_of(best_prediction(row), "this")
    low, high = row[f"{prefix}_low"], row[f"{prefix}_high"]
    where = row["checkpoint"] if len(rows) > 1 else "this step"
    within = "" if low is None else f": for {where} it is within [{low:+.2g}, {high:+.2g}]"
    return f"Whether the entropy falls or rises cannot be told from {row['n_sequences']} sequences of E{within}."


def _speed(rows: Sequence[Row]) -> str:
    """How fast, in percent of H per step, and where the next step could take it."""
    known = [row for row in rows if _sign(row) in _DIRECTIONS and row["H"]]
    if not known:
        return ""
    sizes = [abs(row[best_prediction(row)] / row["H"]) for row in known]
    last = known[-1]
    size = f"by {_percent(sizes[-1])}"
    if len(known) > 1 and _percent(min(sizes)) != _percent(max(sizes)):
        size = f"by {_percent(min(sizes))} to {_percent(max(sizes))} per step, and by {_percent(sizes[-1])} at the last"
    following = interval_of(best_prediction(last), "next")
    low, high = last[f"{following}_low"], last[f"{following}_high"]
    if low is None:
        return f"It changes {size}."
    span = f"{_signed(low / last['H'])} to {_signed(high / last['H'])}"
    return f"It changes {size}; the next update of {last['checkpoint']}, on another batch, should change it by {span}."


def _source(row: Row) -> str:
    """What the change comes from at the last checkpoint: the largest part, and the next where it matters."""
    if _sign(row) not in _DIRECTIONS:
        return ""
    parts = {name: row[name] for name in _SOURCES if name in row}
    parts["batch"] = row["inner_product"] - sum(parts.values())
    total = sum(parts.values())
    if not total:
        return ""
    shares = sorted(((part / total, _SOURCES[name]) for name, part in parts.items()), reverse=True)
    said = [f"{share:.0%} of it comes from {name}" for share, name in shares if share >= 0.1]
    against = [f"{name} takes {-share:.0%} back" for share, name in shares if share <= -0.1]
    return f"At {row['checkpoint']}, {', '.join([*said, *against])}."


def _shape(rows: Sequence[Row]) -> str:
    """Whether the prediction holds at the learning rate, and by how much it is off."""
    unreliable = [row for row in rows if row["eta"] and not row["weights_reliable"]]
    if len(unreliable) == len(rows):
        return "The change could not be measured at the learning rate: the importance weights are not reliable there."
    measured = [
        row for row in rows if row["eta"] and row["weights_reliable"] and row["delta_h"] and _sign(row) in _DIRECTIONS
    ]
    if not measured:
        return ""
    said = f"{_within(_off(measured, 'delta_h1'))} of the first-order prediction"
    if all(row["second_order"] == "resolved" for row in measured):
        said += f", and {_within(_off(measured, 'delta_h12'))} of the one with the curvature"
    changes = "The measured change is" if len(measured) == 1 else f"The {len(measured)} measured changes are"
    return f"{changes} {said}."


def _off(rows: Sequence[Row], prediction: str) -> float:
    """By how much of the measured change a prediction is off, where it is worst."""
    return max(abs(row[prediction] / row["delta_h"] - 1) for row in rows)


def _next(rows: Sequence[Row]) -> list[str]:
    """What to do about what is in the way of an answer, the most serious first."""
    last = rows[-1]
    if all(row["equal_reward_fraction"] == 1 for row in rows):
        return ["All responses to each prompt of U have equal rewards: the batch says nothing. Use other prompts."]
    said = []
    unreliable = [row for row in rows if row["eta"] and not row["weights_reliable"]]
    if unreliable:
        said.append(f"For {_names(unreliable)}, measure at a smaller step size, or with a larger E.")
    unknown = [row for row in rows if _sign(row) == "unknown"]
    if unknown and last["minimum_detectable"]:
        said.append(f"This E tells changes from {last['minimum_detectable']:.2g} nats up: take a larger one for less.")
    without = [row for row in rows if row["interval_over_u"] != "valid"]
    if without:
        reason = without[-1]["interval_over_u"].partition(": ")[2]
        said.append(f"What another batch would do is not said for {_names(without)}: {reason}.")
    return said


def _names(rows: Sequence[Row]) -> str:
    names = [row["checkpoint"] for row in rows]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} checkpoints ({names[0]} … {names[-1]})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _within(share: float) -> str:
    return f"within {_percent(max(share, 1e-3))}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2g} %"
