"""rescore-e-batch: ℓ and h of one shard with every parameter moved to the next number: floating-point noise alone."""

from typing import TYPE_CHECKING, Any

from entropy_core.stages.score import score
from entropy_core.stages.sequences import Law, policy_of

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def rescore(out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", draw: int) -> dict[str, Any]:
    """Score one shard with other rounding errors.

    A moved policy rounds differently at every operation, and on sequences of one kind these errors do not average out.
    What they do to ΔH shows when the parameters move by no more than their own rounding.

    Args:
        out: as `score`.
        execution: as `score`.
        law: the policy.
        sequences: a shard of sample-e-batch.
        draw: which of several independent ways to round.

    Returns:
        As `score`.
    """
    with policy_of(law, execution).jittered(seed=draw):
        return score(out, execution, law=law, sequences=sequences)
