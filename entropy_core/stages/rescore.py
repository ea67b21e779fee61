"""rescore-e-batch: rescore E with every parameter moved to the next floating-point number, to measure rounding."""

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
    """Score the first sequences of E with different rounding errors.

    A moved policy rounds differently at every operation, and on similar sequences these errors do not average out.
    Moving the parameters by no more than their own rounding shows the effect of these errors on ΔH.

    Args:
        out: writer of `tokens.safetensors`, with columns logprobs and entropies, in nats.
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: shards of sample-e-batch that contain the first `count` sequences.
        count: number of sequences; fixed, so that the noise does not depend on the shard size.
        draw: seed of the random directions in which parameters move.

    Returns:
        Summary: the number of sequences.
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
