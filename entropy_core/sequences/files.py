"""Write and read sequences: token ids, flat with offsets, one file per shard."""

from typing import TYPE_CHECKING

import torch

from entropy_core.sequences.batch import BatchedSequences

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact, Writer


def write_sequences(out: "Writer", sequences: BatchedSequences) -> None:
    """Write token ids, flat with offsets, to `tokens.safetensors`, and log q if another law drew them."""
    tensors = {
        "prompt_tokens": sequences.prompt_tokens,
        "prompt_offsets": sequences.prompt_offsets_N1,
        "response_tokens": sequences.response_tokens_K,
        "response_offsets": sequences.response_offsets_N1,
    }
    if sequences.proposal_logprobs_K is not None:
        tensors["proposal_logprobs"] = sequences.proposal_logprobs_K
    out.tensors(tensors, "tokens.safetensors")


def read_sequences(artifact: "Artifact") -> BatchedSequences:
    """Read the sequences of one shard."""
    tensors, table = artifact.tensors("tokens.safetensors"), artifact.table("sequences.parquet")
    return BatchedSequences(
        sequence_ids_N=torch.tensor(table["sequence_id"].to_pylist()),
        prompt_ids_N=torch.tensor(table["prompt_id"].to_pylist()),
        draws_N=torch.tensor(table["draw"].to_pylist()),
        prompt_tokens=tensors["prompt_tokens"],
        prompt_offsets_N1=tensors["prompt_offsets"],
        response_tokens_K=tensors["response_tokens"],
        response_offsets_N1=tensors["response_offsets"],
        finish_reasons=tuple(table["finish_reason"].to_pylist()),
        proposal_logprobs_K=tensors.get("proposal_logprobs"),
    )
