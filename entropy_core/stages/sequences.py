"""What the stages that handle sequences share: the policy of a law, and sequences on disk."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.batched_sequences import BatchedSequences
from entropy_core.errors import NonFiniteError
from entropy_core.numerics.vectors import Block
from entropy_core.policy import Policy
from entropy_core.pretrained import load_policy, use_full_precision
from entropy_core.sequence_processor import GenerationConfig, SequenceProcessor

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

Law = Mapping[str, Any]
"""The policy as a probability law: `weights` and `base` (digests; `base` is empty but under an adapter), `dtype`,
`attn_implementation`, `temperature`."""


def policy_of(law: Law, execution: "Execution") -> Policy:
    """The policy of a law, in full precision."""
    use_full_precision()
    directory = execution.paths[law["weights"]]
    base = execution.paths[law["base"]] if law["base"] else None
    digest, files = law["weights"] + law["base"], tuple(execution.stamps([law["weights"], law["base"]]).items())
    policy = load_policy(directory, digest, law["dtype"], law["attn_implementation"], execution.device, base, files)
    policy.limit_logits(execution.head_chunk_megabytes)
    policy.recompute_activations = execution.recompute_activations
    return policy


def processor_of(
    law: Law, execution: "Execution", max_new_tokens: int = 0, stop_strings: Sequence[str] = ()
) -> SequenceProcessor:
    """A `SequenceProcessor` of a law; `max_new_tokens` and `stop_strings` matter for generating only."""
    config = GenerationConfig(
        law["temperature"], max_new_tokens, execution.gen_batch_size, execution.tf_batch_size, tuple(stop_strings)
    )
    return SequenceProcessor(policy_of(law, execution), config, execution.progress)


@contextmanager
def moved_by(processor: SequenceProcessor, update: "Artifact", eta: float) -> Iterator[None]:
    """Within the context the policy is at θ + ηv, and what it cannot compute there is said with η."""
    try:
        with processor.policy.moved(update.vector("direction"), eta):
            yield
    except NonFiniteError as error:
        fact = f"at the step size η = {eta:g}: {error.fact}"
        raise NonFiniteError(fact, cause=error.cause, way_out=error.way_out) from None


def write_sequences(out: "Writer", sequences: BatchedSequences) -> None:
    """Token ids, flat with offsets."""
    out.tensors(
        {
            "prompt_tokens": sequences.prompt_tokens,
            "prompt_offsets": sequences.prompt_offsets_N1,
            "response_tokens": sequences.response_tokens_K,
            "response_offsets": sequences.response_offsets_N1,
        },
        "tokens.safetensors",
    )


def read_sequences(artifact: "Artifact") -> BatchedSequences:
    """The sequences of one shard."""
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
    )


def as_tangent(direction: Mapping[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """A direction in the dtype and on the device of the policy's parameters."""
    parameters = policy.named_parameters()
    return {name: v.to(parameters[name]) for name, v in direction.items()}


def tangent_of(direction: Mapping[Block, Tensor], policy: Policy) -> dict[str, Tensor]:
    """The same of a direction that comes in blocks."""
    tangent = {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in policy.named_parameters().items()
    }
    flat = {name: tensor.view(-1) for name, tensor in tangent.items()}
    for (name, start, stop), values in direction.items():
        flat[name][start:stop] = values
    return tangent
