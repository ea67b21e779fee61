"""score-e-batch, score-u-batch: log-probability ℓ and entropy h of every response token of one shard."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from torch import Tensor

from entropy_core.errors import NonFiniteError
from entropy_core.numerics import weights
from entropy_core.numerics.unseen import states
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import LogprobResults
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Sequences


def score(out: "Writer", execution: "Execution", *, policy: PolicySpec, sequences: "Sequences") -> dict[str, Any]:
    """Score one shard by teacher forcing.

    Args:
        out: writer of `tokens.safetensors` (logprobs, entropies, nats; states, see `numerics.unseen`; and
            proposal_logprobs, log q, if another law than the policy drew the sequences) and `scores.parquet` (one row
            per sequence).
        execution: device and micro-batch size.
        policy: the policy to score with.
        sequences: artifact of a sampling stage.

    Returns:
        Summary: numbers of sequences and tokens, the sum of their entropies in nats, and the size of the vocabulary.

    Raises:
        NonFiniteError: the weights from the law that drew the sequences to the policy over- or underflow.
    """
    batch = read_sequences(sequences)
    processor = processor_of(policy, execution)
    results, diagnostics = processor.score(batch)
    columns = {"logprobs": results.logprobs_K, "entropies": results.entropies_K}
    columns["states"] = states(batch.prompt_ids_N, batch.response_tokens_K, batch.response_offsets_N1)
    if batch.proposal_logprobs_K is not None:
        columns["proposal_logprobs"] = batch.proposal_logprobs_K
        _require_weights(batch.proposal_logprobs_K, results)
    batch.table(columns).write(out)
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
    return {
        "sequences": len(batch),
        "tokens": len(batch.response_tokens_K),
        "entropy": float(diagnostics.sum_entropies_N.sum()),
        "vocabulary": processor.policy.model.get_output_embeddings().weight.shape[0],
    }


def _require_weights(log_q_K: Tensor, results: LogprobResults) -> None:
    to_policy = weights.prefix_weights(log_q_K, results.logprobs_K, results.offsets_N1)
    if not weights.log_weights_are_usable(to_policy):
        raise NonFiniteError(
            "the weights from the law that drew E to the policy are too large or too small for float64",
            cause="a proposal that is far from the policy, and long responses",
            fix="set generation.proposal_temperature closer to the policy's, or generation.proposal_share below 1",
        )
