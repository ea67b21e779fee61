"""The policy of a law, and what samples and scores sequences with it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.numerics.vectors import Block
from entropy_core.policy.model import Policy
from entropy_core.policy.pretrained import load_policy, use_full_precision
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

if TYPE_CHECKING:
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


def tangent_of(direction: Mapping[Block, Tensor], policy: Policy) -> dict[str, Tensor]:
    """The same of a direction that comes in blocks."""
    tangent = {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in policy.named_parameters().items()
    }
    flat = {name: tensor.view(-1) for name, tensor in tangent.items()}
    for (name, start, stop), values in direction.items():
        flat[name][start:stop] = values
    return tangent
