"""rescore-e-batch: ℓ and h again with every parameter moved to the next number: floating-point noise alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from entropy_core.policy import moves
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import concatenate

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import SequencesOfE


def rescore(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    count: int,
    draw: int,
) -> dict[str, Any]:
    """Score the first sequences of E with other rounding errors.

    A moved policy rounds differently at every operation, and on sequences of one kind these errors do not average out.
    What they do to ΔH shows when the parameters move by no more than their own rounding.

    Args:
        out: `tokens.safetensors` (logprobs, entropies).
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: the shards of sample-e-batch that hold them.
        count: how many sequences; fixed, so that the noise does not depend on the size of a shard.
        draw: which of several independent ways to round.

    Returns:
        Number of sequences.
    """
    processor = processor_of(policy, execution)
    with moves.jittered(processor.policy, seed=draw):
        tables = []
        for batch in map(read_sequences, sequences):
            results, _ = processor.score(batch)
            tables.append(batch.table({"logprobs": results.logprobs_K, "entropies": results.entropies_K}))
    table = concatenate(tables).first(count)
    table.write(out)
    return {"sequences": len(table.sequences_N)}
