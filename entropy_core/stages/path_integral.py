"""path-integral: score E and differentiate it along v at quadrature nodes between θ and θ + ηv.

θ are the policy's parameters, v is the step per unit of learning rate, and η is the step size.
"""

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
    from entropy_core.store.inputs import AnyStep, SequencesOfE


def path_integral(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "SequencesOfE",
    update: "AnyStep",
    eta: float,
) -> dict[str, Any]:
    """Compute log-probabilities ℓ, entropies h and their derivatives along v for one shard of E, at every node.

    Args:
        out: writer of `tokens.safetensors`, with columns logprobs_j and entropies_j (nats), dlogprobs_j and
            dentropies_j (nats per unit of η) for each node j.
        execution: device and micro-batch size.
        policy: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update or phase-step, which holds v.
        eta: step size η; the learning rate gives the trainer's own step.

    Returns:
        Summary: the number of sequences.
    """
    processor = processor_of(policy, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    columns: dict[str, Tensor] = {}
    for j, node in enumerate(NODES):
        with moved_by(processor, update, node * eta):
            derivatives = forward_mode(processor, batch, direction)
        columns |= {f"{name.removesuffix('_K')}_{j}": column_K for name, column_K in derivatives._asdict().items()}
    batch.table(columns).write(out)
    return {"sequences": len(batch)}
