"""importance: ℓ' and h' of one shard of E under the moved policy θ + ηv."""

from typing import TYPE_CHECKING, Any

from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.law import Law, processor_of
from entropy_core.sequences.moves import moved_by

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


def importance(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", update: "Artifact", eta: float
) -> dict[str, Any]:
    """Score one shard under θ + ηv.

    Args:
        out: `tokens.safetensors` (logprobs, entropies, offsets).
        execution: device and micro-batch.
        law: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        eta: absolute step size.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    batch = read_sequences(sequences)
    with moved_by(processor, update, eta):
        results, _ = processor.score(batch)
    out.tensors(
        {"logprobs": results.logprobs_K, "entropies": results.entropies_K, "offsets": results.offsets_N1},
        "tokens.safetensors",
    )
    return {"sequences": len(batch)}
