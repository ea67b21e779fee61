"""Every interval, standard error and p-value says what it is for, in words of a short list."""

import pyarrow as pa
import pytest

from entropy_core.estimates.fields import TARGETS
from entropy_core.estimates.tables import RESULTS, TABLES

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


ESTIMANDS = {
    "H": "responses cut at max_new_tokens",
    "mean_length": "at most max_new_tokens",
    "truncated_fraction": "cut at max_new_tokens",
    "delta_h1": "change of H",
    "delta_h12": "change of H",
    "delta_h": "change of H",
    "gradient_norm": "cut and masked as by the trainer",
    "mean_reward": "of all responses, those that were cut included",
    "equal_reward_fraction": "prompts of U",
}


@pytest.mark.parametrize("name", ESTIMANDS)
def test_what_is_estimated_is_written_at_its_column(name: str):
    assert ESTIMANDS[name] in RESULTS.field(name).metadata[b"description"].decode()


def test_where_there_is_no_interval_over_u_a_column_says_why():
    said = [RESULTS.field(name).metadata[b"description"].decode() for name in ("delta_h2", "interval_over_u")]
    assert said[0].endswith("its variation over U is unknown") and "no valid interval over U, and why" in said[1]
    assert "as interval_over_u" in RESULTS.field("delta_h12_interval_over_u").metadata[b"description"].decode()


def test_each_quantity_has_all_three_intervals():
    for prefix in ("", "delta_h12_", "delta_h_"):
        for update in ("this", "mean", "next"):
            assert {f"{prefix}{update}_update_{end}" for end in ("low", "high")} <= set(RESULTS.names)
