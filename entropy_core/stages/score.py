"""score-e-batch, score-u-batch: ℓ and h of every response token of one shard. discriminate-u: what predictors need."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.policy import TeacherForcedRows
from entropy_core.stages.sequences import Law, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def score(out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact") -> dict[str, Any]:
    """Score one shard by teacher forcing.

    Args:
        out: `tokens.safetensors` (logprobs, entropies, offsets) and `scores.parquet` (a row per sequence).
        execution: device and micro-batch.
        law: the policy.
        sequences: artifact of a sampling stage.

    Returns:
        Number of sequences, and the sum of their entropies in nats.
    """
    batch = read_sequences(sequences)
    results, diagnostics = processor_of(law, execution).score(batch)
    out.tensors(
        {"logprobs": results.logprobs_K, "entropies": results.entropies_K, "offsets": results.offsets_N1},
        "tokens.safetensors",
    )
    out.table(
        pa.table(
            {
                "sequence_id": batch.sequence_ids_N.tolist(),
                "prompt_id": batch.prompt_ids_N.tolist(),
                "length": batch.lengths_N.tolist(),
                "finish_reason": list(batch.finish_reasons),
                "sum_logprob": diagnostics.sum_logprobs_N.tolist(),
                "sum_entropy": diagnostics.sum_entropies_N.tolist(),
                "max_surprisal": diagnostics.max_surprisal_N.tolist(),
            }
        ),
        "scores.parquet",
    )
    return {"sequences": len(batch), "entropy": float(diagnostics.sum_entropies_N.sum())}


def discriminate(out: "Writer", execution: "Execution", *, law: Law, sequences: "Sequence[Artifact]") -> dict[str, Any]:
    """E_π[S*] of the step of every token of U, for the predictor of arXiv:2602.03392.

    Args:
        out: `tokens.safetensors` (expected, offsets).
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-u-batch.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    shards = [read_sequences(shard) for shard in sequences]

    def expected(rows: TeacherForcedRows) -> list[Tensor]:
        return [processor.policy.expected_discriminators(rows, law["temperature"])]

    expected_K = torch.cat([processor.map_tokens(shard, expected)[0] for shard in shards])
    offsets_N1 = ragged.concatenate([shard.response_offsets_N1 for shard in shards])
    out.tensors({"expected": expected_K, "offsets": offsets_N1}, "tokens.safetensors")
    return {"sequences": len(offsets_N1) - 1}
