"""How the tokens of the update batch U answer to a covector, with the norms of DoRA's layers held as the trainer's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from entropy_core.checkpoints.dora import held_norms
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.vectors import Block
from entropy_core.policy.derivatives import scaled_tangent_of
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import SequenceProcessor

CPU_TOKENS = 2**12
"""Tokens of a micro-batch on a CPU. The tensors of larger ones go back to the system after each operation, and to get
new memory takes a third of a forward-mode pass.
"""


def token_sensitivities(
    processor: SequenceProcessor, shards: Sequence[BatchedSequences], covector: Mapping[Block, Tensor]
) -> TokenPair:
    """Compute ⟨w, ∇ℓ_k⟩ and ⟨w, ∇h_k⟩ of every token of U, by forward mode.

    Args:
        processor: the policy that sampled U.
        shards: the sequences of U.
        covector: w, float64, by block.

    Returns:
        Each float64 [K].
    """
    policy, config = processor.policy, processor.config
    if policy.device.type == "cpu":
        config = replace(config, tf_batch_tokens=min(config.tf_batch_tokens, CPU_TOKENS))
    tangent, scale = scaled_tangent_of(covector, policy)
    with held_norms(policy.model):
        in_parts = SequenceProcessor(policy, config, processor.progress)
        found = [forward_mode(in_parts, shard, tangent)[2:] for shard in shards]
    return TokenPair(*(torch.cat(columns).double() * scale for columns in zip(*found, strict=True)))
