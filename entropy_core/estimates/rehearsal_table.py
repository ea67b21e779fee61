"""The columns of rehearsal.parquet: H, J and the length along real steps, from several seeds."""

import pyarrow as pa

from entropy_core.estimates.fields import NATS, REAL, TEXT, WHOLE, field

QUANTITIES = {"H": ("entropy", NATS), "J": ("expected reward", "reward"), "length": ("mean length", "tokens")}
DIFFERENCES = {"H": "difference", "J": "difference_j", "length": "difference_length"}
_ERROR = "for this policy: over its E; of all seeds together: between them"
_OF_RUN = "for one more run like these, from another seed; null for a single seed"


def _of_quantity(name: str) -> list[pa.Field]:
    what, unit = QUANTITIES[name]
    without = "; null without a reward for each response" if name == "J" else ""
    return [
        field(name, REAL, unit, f"{what} of the policy after the step, on an E of its own{without}"),
        field(f"{name}_se", REAL, unit, f"standard error of {name} {_ERROR}"),
        field(f"{name}_low", REAL, unit, f"lower end of the interval of {name} {_ERROR}"),
        field(f"{name}_high", REAL, unit, f"upper end of the interval of {name} {_ERROR}"),
        field(f"{name}_run_low", REAL, unit, f"lower end of the band of {name} {_OF_RUN}"),
        field(f"{name}_run_high", REAL, unit, f"upper end of the band of {name} {_OF_RUN}"),
    ]


def _of_difference(name: str) -> list[pa.Field]:
    difference, (_, unit) = DIFFERENCES[name], QUANTITIES[name]
    return [
        field(difference, REAL, unit, f"{name} minus that of the run as it is, from the same seed; null for it itself"),
        field(f"{difference}_se", REAL, unit, f"standard error of {difference}, paired, {_ERROR}"),
        field(f"{difference}_low", REAL, unit, f"lower end of the interval of {difference}, paired, {_ERROR}"),
        field(f"{difference}_high", REAL, unit, f"upper end of the interval of {difference}, paired, {_ERROR}"),
    ]


_FIRST = "first measured step at which"
REHEARSAL = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence: of the entropy"),
        field("intervention", TEXT, "", "what is changed in every step; as it is: nothing"),
        field("replicate", WHOLE, "", "which of the seeds, from 1; null: all of them together"),
        field("replicates", WHOLE, "", "number of seeds that the row is of"),
        field("rehearsal_step", WHOLE, "optimizer steps", "number of steps since the checkpoint"),
        *(one for name in QUANTITIES for one in _of_quantity(name)),
        *(one for name in QUANTITIES for one in _of_difference(name)),
        field("floor", REAL, "nats per token", "the floor that is asked for; null: none, or another normalisation"),
        field("floor_step", WHOLE, "optimizer steps", f"{_FIRST} H of the row's chain is below the floor; null: none"),
        field(
            "floor_low",
            WHOLE,
            "optimizer steps",
            f"{_FIRST} the lower end of the band (of a single seed: of the interval) is below the floor; null: none",
        ),
        field(
            "floor_high",
            WHOLE,
            "optimizer steps",
            f"{_FIRST} the upper end of the band (of a single seed: of the interval) is below the floor; null: none",
        ),
        field("confidence_level", REAL, "1", "confidence level of every interval in this row"),
    ]
)
"""One row per normalisation, intervention, seed and measured step, and one of all seeds together."""
