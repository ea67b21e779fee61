"""score-e-batch, score-u-batch: log-probability ℓ and entropy h of every response token of one shard."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Sequences


def score(out: "Writer", execution: "Execution", *, policy: PolicySpec, sequences: "Sequences") -> dict[str, Any]:
    """Score one shard by teacher forcing.

    Args:
        out: writer of `tokens.safetensors` (logprobs, entropies; nats) and `scores.parquet` (one row per sequence).
        execution: device and micro-batch size.
        policy: the policy to score with.
        sequences: artifact of a sampling stage.

    Returns:
        Summary: number of sequences, and the sum of their entropies in nats.
    """
    batch = read_sequences(sequences)
    results, diagnostics = processor_of(policy, execution).score(batch)
    batch.table({"logprobs": results.logprobs_K, "entropies": results.entropies_K}).write(out)
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
