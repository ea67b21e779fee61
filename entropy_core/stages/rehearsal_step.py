"""rehearsal-step: a real optimizer step of a rehearsal, on fresh responses of the policy after the steps before it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.losses.changed import changed_loss, excess_of
from entropy_core.losses.interventions import InterventionSpec, changed_spec
from entropy_core.losses.sampled import sampled_batch
from entropy_core.losses.spec import LossSpec
from entropy_core.losses.taken_step import taken_step, write_step
from entropy_core.numerics.interventions import Known
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        Checkpoint,
        Discriminators,
        Rewards,
        ScoresOfReference,
        ScoresOfU,
        SequencesOfU,
    )


def rehearsal_step(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    checkpoint: "Checkpoint",
    sequences: "Sequence[SequencesOfU]",
    rewards: "Rewards",
    scores: "Sequence[ScoresOfU]",
    reference: "Sequence[ScoresOfReference]",
    discriminators: "Discriminators | None",
    loss: LossSpec,
    intervention: InterventionSpec,
    responses_per_prompt: int,
    max_grad_norm: float,
    rate: float,
) -> dict[str, Any]:
    """Take the step; without an intervention the first one is v of compute-update, bit for bit.

    Args:
        out: receives the vector `direction` (D, the sum of all steps since the checkpoint per unit of the nominal
            learning rate) and each moment after the step under the optimizer's name, by parameter name.
        execution: device and micro-batch size.
        policy: the policy after the steps before, which drew the sequences; its `step` is the step before.
        checkpoint: artifact of load-checkpoint.
        sequences: shards of sample-u-batch.
        rewards: artifact of reward-u-batch.
        scores: shards of score-u-batch.
        reference: shards of score-u-reference; empty without a KL term.
        discriminators: artifact of discriminate-u, if the intervention selects by them; else None.
        loss: the loss of the run.
        intervention: what is changed in it or in the optimizer, at this step as at those before.
        responses_per_prompt: G.
        max_grad_norm: global norm at which the gradient is clipped; 0 for no clipping.
        rate: learning rate of the step over the nominal one, which is that of the first step.

    Returns:
        The number of steps since the checkpoint, the nominal learning rate, the rate, and what `write_step` returns.
    """
    processor, earlier = processor_of(policy, execution), policy.step
    shards, spec = [read_sequences(shard) for shard in sequences], changed_spec(loss, intervention)
    batch = spec.batch(*sampled_batch(spec, shards, rewards, scores, reference, responses_per_prompt))
    nothing_K = torch.zeros_like(batch.logprobs_K)
    excess_K = nothing_K if discriminators is None else excess_of(scores, discriminators)[1]
    known = Known(batch, excess_K, nothing_K, intervention.seed)  # what is rehearsed selects by no sensitivity
    changed = changed_loss(intervention, execution, spec, known)
    coefficients = changed.coefficients
    altered = changed.altered._replace(learning_rate=rate * changed.altered.learning_rate)
    found = taken_step(coefficients, processor, shards, checkpoint, execution, max_grad_norm, altered, earlier)
    return {
        "steps": 1 + (earlier.summary["steps"] if earlier else 0),
        "learning_rate": checkpoint.summary["learning_rate"],
        "rate": rate,
        **write_step(out, found, checkpoint, processor.policy, earlier),
    }
