"""altered-step: the step v' of the optimizer under one intervention, kept for the passes that move the policy by it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.losses.changed import changed_by, excess_of
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.taken_step import taken_step
from entropy_core.numerics.vectors import squares
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        Checkpoint,
        Discriminators,
        ScoresOfU,
        Sensitivities,
        SequencesOfU,
        Update,
    )


def altered_step(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    scores_u: "Sequence[ScoresOfU]",
    discriminators_u: "Discriminators",
    checkpoint: "Checkpoint",
    update: "Update",
    sensitivities: "Sensitivities",
    intervention: InterventionSpec,
) -> dict[str, Any]:
    """Compute v' per unit of the nominal learning rate; see `predict` for the inputs.

    Args:
        out: receives the vector `direction`, by parameter name.
        execution: device and micro-batch.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.
        scores_u: shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update, of which no vector is read.
        sensitivities: artifact of half-sensitivities.
        intervention: what is changed.

    Returns:
        Norm of v', and the clip factor of its gradient.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]
    table, excess_K = excess_of(scores_u, discriminators_u)
    (changed,) = changed_by([intervention], execution, update, table, excess_K, sensitivities)
    max_norm = update.summary["max_grad_norm"]
    found = taken_step(changed.coefficients, processor, shards, checkpoint, execution, max_norm, changed.altered)
    shapes = {name: tuple(p.shape) for name, p in processor.policy.named_parameters().items()}
    of_direction = 0.0
    with out.vector("direction", shapes, getattr(torch, policy.dtype)) as direction:
        for block, v in found.blocks():
            of_direction += squares(v)
            direction.write(block, v)
    return {"update_norm": of_direction**0.5, "clip_factor": found.clip_factor}
