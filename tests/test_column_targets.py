"""Every interval, standard error and p-value says what it is for, in words of a short list."""

import pyarrow as pa
import pytest

from entropy_core.estimates.tables import RESULTS, TABLES, TARGETS

SCHEMAS = {"results": RESULTS, **TABLES}


def is_for_something(name: str) -> bool:
    return name.endswith(("_low", "_high", "_se", "p_value")) or name.startswith(("se_", "p_"))


@pytest.mark.parametrize(
    ("table", "field"), [(t, f) for t, s in SCHEMAS.items() for f in s if is_for_something(f.name)]
)
def test_what_an_interval_is_for(table: str, field: pa.Field):
    description = field.metadata[b"description"].decode()
    said = [target for target in TARGETS if target in description]
    assert len(said) == 1, (table, field.name, description)
    for update in ("this", "mean", "next"):
        if f"{update}_update" in field.name:
            assert f"{update} update" in said[0]


def test_each_quantity_has_all_three_intervals():
    for prefix in ("", "delta_h_"):
        for update in ("this", "mean", "next"):
            assert {f"{prefix}{update}_update_{end}" for end in ("low", "high")} <= set(RESULTS.names)
