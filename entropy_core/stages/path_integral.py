"""path-integral: ℓ, h and their derivatives along v, at the nodes between θ and θ + ηv."""

from typing import TYPE_CHECKING, Any

from entropy_core.numerics.quadrature import NODES
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.law import Law, processor_of
from entropy_core.sequences.moves import moved_by

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


def path_integral(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", update: "Artifact", eta: float
) -> dict[str, Any]:
    """ℓ, h and their derivatives along v for every token of one shard, at each node between θ and θ + ηv.

    Args:
        out: `tokens.safetensors`: logprobs_j, entropies_j, dlogprobs_j and dentropies_j of node j, offsets.
        execution: device and micro-batch.
        law: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        eta: absolute step size.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    columns = {"offsets": batch.response_offsets_N1}
    for j, node in enumerate(NODES):
        with moved_by(processor, update, node * eta):
            there = forward_mode(processor, batch, direction)
        columns |= {f"{name.removesuffix('_K')}_{j}": column_K for name, column_K in there._asdict().items()}
    out.tensors(columns, "tokens.safetensors")
    return {"sequences": len(batch)}
