"""discriminate-u: what the predictors of the literature need of U beside ℓ and h."""

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
    """E_π[S*] of the step of every token of U, for the predictor of arXiv:2602.03392.

    Args:
        out: `tokens.safetensors` (expected).
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: the shards of sample-u-batch.

    Returns:
        Number of sequences.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]

    def expected(rows: TeacherForcedRows) -> list[Tensor]:
        return [expected_discriminators(processor.policy, rows, policy.temperature)]

    table = concatenate([shard.table({"expected": processor.map_tokens(shard, expected)[0]}) for shard in shards])
    table.write(out)
    return {"sequences": len(table.sequences_N)}
