"""rehearsal: entropy, expected reward and length along real steps, with bands between seeds, from cached columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from entropy_core.estimates.rehearsal import chains_of, rehearsal_rows
from entropy_core.estimates.rehearsal_table import REHEARSAL
from entropy_core.estimates.tables import to_table
from entropy_core.numerics.choices import Normalization

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import RehearsedPolicy


def rehearsal(
    out: "Writer",
    execution: "Execution",
    *,
    policies: "Sequence[RehearsedPolicy]",
    floor: float,
    normalizations: Sequence[Normalization],
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> dict[str, Any]:
    """Estimate H, J and the length of every policy, and how interventions differ from the run as it is.

    Args:
        out: writer of `rehearsal.parquet` (schema `rehearsal_table.REHEARSAL`).
        execution: unused.
        policies: what was measured; those of the run as it is come first.
        floor: of the entropy, nats per token; 0: none.
        normalizations: normalisations of the entropy.
        units: independent units of E.
        confidence_level: confidence level of the intervals and bands.

    Returns:
        Summary: numbers of rows and of interventions.
    """
    chains = chains_of(policies, units)
    rows = [
        row
        for of in normalizations
        for chain in chains
        for row in rehearsal_rows(chain, chains[0], of, floor, confidence_level)
    ]
    out.table(to_table(rows, REHEARSAL), "rehearsal.parquet")
    return {"rows": len(rows), "interventions": len(chains) - 1}
