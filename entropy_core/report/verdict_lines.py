"""The section of the report that answers the separate questions of a row, and those over all checkpoints."""

from collections.abc import Sequence

from entropy_core.estimates.selection import Row, at_learning_rate, first_of_each
from entropy_core.numerics.multiple_tests import benjamini_hochberg, holm
from entropy_core.report.markdown import markdown_rows

_QUESTIONS = {
    "checkpoint": "checkpoint",
    "eta_over_lr": "η / lr",
    "estimator": "estimator",
    "sign_this_update": "sign, this update",
    "sign_mean_update": "sign, mean update",
    "sign_next_update": "sign, next update",
    "linearity": "linear?",
    "above_rounding": "above rounding?",
    "weights_reliable": "weights reliable?",
}


def interval(row: Row, name: str) -> str:
    """Format the interval with the columns `name`_low and `name`_high; a dash if there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "–" if low is None else f"[{low:+.3g}, {high:+.3g}]"


def order_sentences(rows: Sequence[Row]) -> list[str]:
    """Say how far the first order is from the change at the learning rate, and the second: a sentence per checkpoint.

    Args:
        rows: rows of the result table, of one normalisation.

    Returns:
        Sentences; none for a checkpoint without a step size other than 0.
    """
    at_lr = first_of_each(at_learning_rate(rows))
    return [f"{row['checkpoint']}, {row['eta_over_lr']:g} × lr: {_of_orders(row)}." for row in at_lr]


def _of_orders(row: Row) -> str:
    if row["delta_h2"] is None:
        second = "there is no δH₂: at no step size but 0 are the weights reliable"
    else:
        second = f"the curvature is δH₂ = {row['delta_h2']:+.2g} {interval(row, 'delta_h2_this_update')}"
    if row["second_order"] == "unresolved":
        second += ", which may be none"
    if not row["weights_reliable"] or row["sign_this_update"] == "unknown" or not row["delta_h1"]:
        return f"the change is not measured well enough to compare; {second}"
    ratio = row["delta_h"] / row["delta_h1"]
    if ratio < 0:
        said = f"the change is {row['delta_h']:+.3g}, and the first order predicts {row['delta_h1']:+.3g}"
    elif round(abs(ratio - 1), 3) == 0:
        said = "the change is as the first order predicts it"
    else:
        off = f"{_percent(abs(ratio - 1))} {'smaller' if ratio < 1 else 'larger'}"
        said = f"the change is {off} than predicted at first order"
    if row["second_order"] != "resolved":
        return f"{said}; {second}"
    return f"{said}; {second}; with it the prediction is within {_percent(abs(row['remainder'] / row['delta_h']))}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def order_lines(rows: Sequence[Row]) -> list[str]:
    """Return the section on the first and the second order.

    Args:
        rows: rows of the result table, of one normalisation.

    Returns:
        Lines of markdown.
    """
    return [
        *(f"- {sentence}" for sentence in order_sentences(rows)),
        "",
        "δH₂ is the second derivative of H along the step, from the step sizes at which ΔH was measured, extrapolated "
        "to 0. Its interval is for this update: E, rounding, and the orders above the second. Where it is without 0, "
        "the headline predicts with it. Prediction and measurement share E: that they agree shows the shape of the "
        "change, not that either is accurate.",
    ]


def verdict_lines(rows: Sequence[Row]) -> list[str]:
    """Return a table of the verdicts, and the p-values at the learning rate over the checkpoints.

    Args:
        rows: rows of the result table, of one normalisation.

    Returns:
        Lines of markdown.
    """
    body = [[_answer(row[name]) for name in _QUESTIONS] for row in rows if row["eta"]]
    lines = [
        *markdown_rows(tuple(_QUESTIONS.values()), body, len(_QUESTIONS)),
        "",
        "Each column answers one question. The sign of ΔH is known if all of its interval has it. *Linear* means that "
        "the whole interval of the curvature ΔH − δH₁ is within 5 % of δH₁, and *nonlinear* that all of it is beyond. "
        "A curvature that is not significant may be either, which is *undecided*. The one word in the table of results "
        "is the first that applies of weights-unreliable, noise-limited, nonlinear, resolved.",
    ]
    return lines + _over_checkpoints(first_of_each(at_learning_rate(rows)))


def _answer(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _over_checkpoints(rows: Sequence[Row]) -> list[str]:
    tables = [[row["checkpoint"]] for row in rows]
    head = ["checkpoint"]
    for name, of in (("p_this_update", "this update"), ("p_mean_update", "mean update")):
        p_values = {i: row[name] for i, row in enumerate(rows) if row[name] is not None and row["weights_reliable"]}
        by_method = [
            list(p_values.values()),
            holm(list(p_values.values())),
            benjamini_hochberg(list(p_values.values())),
        ]
        adjusted = dict(zip(p_values, zip(*by_method, strict=True), strict=True))
        head += [f"p, {of}", "Holm", "Benjamini-Hochberg"]
        for i, cells in enumerate(tables):
            cells += [f"{p:.2g}" for p in adjusted[i]] if i in adjusted else ["–"] * 3
    if len(rows) < 2:
        return []
    return [
        "",
        *markdown_rows(head, tables),
        "",
        "p-values of ΔH = 0 at the step size closest to the learning rate, one per checkpoint, and the same adjusted "
        f"for {len(rows)} checkpoints. At a threshold α, Holm's keep the probability of any false sign below α, and "
        "those of Benjamini and Hochberg the expected share of false signs. Rows of one checkpoint at other step sizes "
        "share E and U, are nearly the same test, and are not counted.",
    ]
