"""path-integral: score E and differentiate it along v at quadrature nodes between θ and θ + ηv.

θ are the policy's parameters, v is the step per unit of learning rate, and η is the step size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.numerics.choices import Arithmetic
from entropy_core.numerics.quadrature import NODES, UP_TO_NODE
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.moves import moved_by
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import TokenTable, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import AnyStep, ScoresOfE, SequencesOfE


def path_integral(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "SequencesOfE",
    update: "AnyStep",
    scores: "ScoresOfE",
    eta: float,
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """Compute log-probabilities ℓ, entropies h and their derivatives along v for one shard of E, at every node.

    Args:
        out: writer of `tokens.safetensors`, with columns logprobs_j and entropies_j (nats), dlogprobs_j and
            dentropies_j (nats per unit of η) for each node j.
        execution: device and micro-batch size.
        policy: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update or phase-step, which holds v.
        scores: the shard of score-e-batch, with ℓ and h at θ in full precision.
        eta: step size η; the learning rate gives the trainer's own step.
        arithmetic: of forward mode.

    Returns:
        Summary: the number of sequences.
    """
    processor = processor_of(policy, execution)
    batch, direction = read_sequences(sequences), update.vector("direction")
    at_nodes = []
    for node in NODES:
        with moved_by(processor, update, node * eta):
            at_nodes.append(forward_mode(processor, batch, direction, arithmetic))
    if arithmetic != "full":
        at_theta = read_tokens([scores], "logprobs", "entropies")
        at_nodes = _from_theta(batch.table({}).join(at_theta), at_nodes, eta)
    columns: dict[str, Tensor] = {}
    for j, derivatives in enumerate(at_nodes):
        columns |= {f"{name.removesuffix('_K')}_{j}": column_K for name, column_K in derivatives._asdict().items()}
    batch.table(columns).write(out)
    return {"sequences": len(batch)}


def _from_theta(at_theta: TokenTable, at_nodes: Sequence[TokenDerivatives], eta: float) -> list[TokenDerivatives]:
    """Replace ℓ and h at the nodes by those at θ plus the integrals of their derivatives.

    The weights of the path are exp Σ(ℓ' − ℓ). In a less exact arithmetic the difference of ℓ' and ℓ would be rounding;
    the integral is as exact as the derivatives.

    Args:
        at_theta: logprobs and entropies at θ.
        at_nodes: ℓ', h' and their derivatives at the nodes.
        eta: step size η.

    Returns:
        The same with other ℓ' and h', float64.
    """
    dlogprobs_JK = torch.stack([node.dlogprobs_K for node in at_nodes]).double()
    dentropies_JK = torch.stack([node.dentropies_K for node in at_nodes]).double()
    up_to_JJ = eta * torch.tensor(UP_TO_NODE, dtype=torch.float64)
    logprobs_JK = at_theta["logprobs"].double() + up_to_JJ @ dlogprobs_JK
    entropies_JK = at_theta["entropies"].double() + up_to_JJ @ dentropies_JK
    return [
        TokenDerivatives(logprobs_K, entropies_K, *node[2:])
        for logprobs_K, entropies_K, node in zip(logprobs_JK, entropies_JK, at_nodes, strict=True)
    ]
