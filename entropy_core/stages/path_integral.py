"""path-integral: ℓ, h and their derivatives along v, at the nodes between θ and θ + ηv."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from entropy_core.numerics.quadrature import NODES
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.moves import moved_by
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import SequencesOfE, Update


def path_integral(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "SequencesOfE",
    update: "Update",
    eta: float,
) -> dict[str, Any]:
    """ℓ, h and their derivatives along v for every token of one shard, at each node between θ and θ + ηv.

    Args:
        out: `tokens.safetensors`: logprobs_j, entropies_j, dlogprobs_j and dentropies_j of node j.
        execution: device and micro-batch.
        policy: at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        eta: absolute step size.

    Returns:
        Number of sequences.
    """
    processor = processor_of(policy, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    columns: dict[str, Tensor] = {}
    for j, node in enumerate(NODES):
        with moved_by(processor, update, node * eta):
            there = forward_mode(processor, batch, direction)
        columns |= {f"{name.removesuffix('_K')}_{j}": column_K for name, column_K in there._asdict().items()}
    batch.table(columns).write(out)
    return {"sequences": len(batch)}
