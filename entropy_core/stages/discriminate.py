"""discriminate-u: E_π[S*] of every token of U, an input of a predictor from the literature."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from entropy_core.policy.discriminators import expected_discriminators
from entropy_core.policy.scorer import TeacherForcedRows
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import concatenate

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import SequencesOfU


def discriminate(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
) -> dict[str, Any]:
    """Compute E_π[S*] = Σ_a π_a²(h + log π_a) at every token of the update batch U.

    π is the policy's distribution at that token and h its entropy. The `discriminator` predictor (arXiv:2602.03392)
    compares it with S* of the sampled token.

    Args:
        out: writer of `tokens.safetensors`, with the column expected in nats.
        execution: device and micro-batch size.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.

    Returns:
        Summary: the number of sequences.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]

    def expected(rows: TeacherForcedRows) -> list[Tensor]:
        return [expected_discriminators(processor.policy, rows, policy.temperature)]

    table = concatenate([shard.table({"expected": processor.map_tokens(shard, expected)[0]}) for shard in shards])
    table.write(out)
    return {"sequences": len(table.sequences_N)}
