"""first-order-e: derivatives ℓ̇ and ḣ of log-probabilities and entropies of E along the step v."""

from typing import TYPE_CHECKING, Any

from entropy_core.numerics.choices import Arithmetic
from entropy_core.policy.blockwise import forward_mode_attention
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.derivatives import central_difference, forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import SequencesOfE, Update


def first_order_e(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "SequencesOfE",
    update: "Update",
    half_width: float,
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """Compute the derivatives of ℓ and h along v for every token of one shard.

    Args:
        out: writer of `tokens.safetensors`, with columns dlogprobs and dentropies (nats per unit of η).
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update, which holds v.
        half_width: half-width ε of central differences; 0 for forward mode.
        arithmetic: of forward mode; central differences subtract passes and are always in full precision.

    Returns:
        Summary: number of sequences, and the attention kernel used.
    """
    processor = processor_of(policy, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    if half_width:
        attention = processor.policy.model.config._attn_implementation
        dlogprobs_K, dentropies_K = central_difference(processor, batch, direction, half_width)
    else:
        attention = forward_mode_attention(processor.policy)
        _, _, dlogprobs_K, dentropies_K = forward_mode(processor, batch, direction, arithmetic)
    batch.table({"dlogprobs": dlogprobs_K, "dentropies": dentropies_K}).write(out)
    return {"sequences": len(batch), "attention": attention}
