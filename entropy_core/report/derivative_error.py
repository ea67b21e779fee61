"""What the report says of the error of δH₁ that comes from how the derivatives over E were computed."""

import math
from collections.abc import Sequence

from entropy_core.estimates.selection import Row, at_learning_rate, first_of_each
from entropy_core.report.markdown import markdown_rows

SMALL = 0.25
"""Of the standard error over E. An error of this part of it costs an interval of 95 % one in a hundred of its cover."""


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each checkpoint where the error is not small; rows are of the result table."""
    return [
        f"{row['checkpoint']}: {_how(row)} shift δH₁ by {_shift(row)}, which is not small against its standard error "
        f"over E of {row['se_given_u']:.2g}. The intervals are wider for it. Set {_exact(row)}."
        for row in _compared(rows)
        if _size(row) > SMALL * row["se_given_u"]
    ]


def section(rows: Sequence[Row]) -> list[str]:
    """Return the table of the errors, one row per checkpoint; nothing for forward mode in full precision."""
    body = [
        (
            row["checkpoint"],
            _how(row),
            f"{row['derivative_check']:.1e}",
            f"{row['delta_h1']:+.4g}",
            _shift(row),
            f"{row['se_given_u']:.2g}",
            "yes" if _size(row) <= SMALL * row["se_given_u"] else "no",
        )
        for row in _compared(rows)
    ]
    if not body:
        return []
    head = ("checkpoint", "derivatives", "rms error of a token", "δH₁", "error of δH₁", "SE of δH₁ over E", "small?")
    return [
        *markdown_rows(head, body),
        "",
        "On the first sequences of E the derivatives of all tokens were computed by forward mode in full precision, "
        "too. The rms error is relative to the derivatives. The error of δH₁ is what remains of it in the mean over "
        "these sequences, where most of it averages out, and it is part of every interval of δH₁, of the curvature "
        f"and of δH₂. It is small if, with its standard error, it is below {SMALL:g} of the standard error over E. ΔH "
        "by importance sampling subtracts passes, and these are always in full precision.",
    ]


def _compared(rows: Sequence[Row]) -> list[Row]:
    return [row for row in first_of_each(at_learning_rate(rows)) if row.get("derivative_check") is not None]


def _size(row: Row) -> float:
    return math.hypot(row["derivative_error"], row["derivative_error_se"])


def _shift(row: Row) -> str:
    return f"{row['derivative_error']:+.2g} (SE {row['derivative_error_se']:.1g})"


def _how(row: Row) -> str:
    return "central differences" if row["arithmetic"] == "full" else f"derivatives in {row['arithmetic']}"


def _exact(row: Row) -> str:
    return "policy.derivative: forward_mode" if row["arithmetic"] == "full" else "policy.arithmetic: full"
