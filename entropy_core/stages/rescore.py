"""rescore-e-batch: ℓ and h of one shard again, by other micro-batches: what floating-point noise alone changes."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from entropy_core.stages.score import score
from entropy_core.stages.sequences import Law

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def rescore(out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact") -> dict[str, Any]:
    """Score one shard under another micro-batching, for the numerical-noise floor of ΔH.

    Args:
        out: as `score`.
        execution: its micro-batch is not used, but one that differs from it.
        law: the policy.
        sequences: a shard of sample-e-batch.

    Returns:
        As `score`.
    """
    other = execution.tf_batch_size // 2 + 1
    return score(out, replace(execution, tf_batch_size=other), law=law, sequences=sequences)
