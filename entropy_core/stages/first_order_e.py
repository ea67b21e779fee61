"""first-order-e: ℓ̇ and ḣ of E along v."""

from typing import TYPE_CHECKING, Any

from entropy_core.policy.attention import attention_without_derivative
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
) -> dict[str, Any]:
    """Derivatives of ℓ and h along v for every token of one shard.

    Args:
        out: `tokens.safetensors` (dlogprobs, dentropies).
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        half_width: ε of the central difference; 0 for forward mode.

    Returns:
        Number of sequences, and the attention kernel that computed the derivatives.
    """
    processor = processor_of(policy, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    if half_width:
        attention = attention_without_derivative(processor.policy)
        dlogprobs_K, dentropies_K = central_difference(processor, batch, direction, half_width)
    else:
        attention = policy.attn_implementation
        _, _, dlogprobs_K, dentropies_K = forward_mode(processor, batch, direction)
    batch.table({"dlogprobs": dlogprobs_K, "dentropies": dentropies_K}).write(out)
    return {"sequences": len(batch), "attention": attention}
