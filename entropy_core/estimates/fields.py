"""How a column of a result table is described: its type, its unit and its meaning, in the metadata of its field."""

import pyarrow as pa

TEXT, REAL, WHOLE = pa.string(), pa.float64(), pa.int64()
NATS = "nats per token (per_token) or per sequence (per_sequence)"

TARGETS = ("for this policy", "for this update", "for the mean update", "for the next update")
"""What an interval, a standard error or a p-value may be for; the description of its column says which."""


def field(name: str, kind: pa.DataType, unit: str, description: str) -> pa.Field:
    """Describe a column."""
    return pa.field(name, kind, metadata={"unit": unit, "description": description})


def ends(prefix: str, quantity: str) -> list[pa.Field]:
    """Both ends of the three intervals of a quantity."""
    what = {"this": TARGETS[1], "mean": TARGETS[2], "next": TARGETS[3]}
    return [
        field(f"{prefix}{update}_update_{end}", REAL, NATS, f"{side} end of the interval of {quantity} {what[update]}")
        for update in what
        for end, side in (("low", "lower"), ("high", "upper"))
    ]
