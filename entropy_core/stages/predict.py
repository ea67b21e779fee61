"""predict: what the exact step v' of the optimizer under one intervention does to the entropy, to first order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from entropy_core.losses.changed import changed_by, excess_of
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.taken_step import taken_step
from entropy_core.numerics.halves import HALVES, KINDS
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        Checkpoint,
        Discriminators,
        Gradient,
        RewardGradient,
        ScoresOfU,
        Sensitivities,
        SequencesOfU,
        Update,
    )


def predict(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    scores_u: "Sequence[ScoresOfU]",
    discriminators_u: "Discriminators",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
    reward_gradient: "RewardGradient | None",
    sensitivities: "Sensitivities",
    intervention: InterventionSpec,
) -> dict[str, Any]:
    """Compute ⟨∇H, v'⟩ with ∇H of each half of E. Costs a backward pass over U; v' is not kept.

    Args:
        out: unused; what is found is in the summary.
        execution: device and micro-batch.
        policy: the policy that sampled U.
        sequences: shards of sample-u-batch.
        scores_u: shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update, of which no vector is read.
        gradient: artifact of entropy-gradient.
        reward_gradient: artifact of reward-gradient; None: nothing is said of the expected reward.
        sensitivities: artifact of block-sensitivities, for what selects tokens by it.
        intervention: what is changed.

    Returns:
        `products`: ⟨∇, v'⟩ by kind, one for each half of E, and `reward`, the same with ∇J; norm of the gradient, and
        its clip factor.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]
    table, excess_K = excess_of(scores_u, discriminators_u)
    changed = changed_by(intervention, execution, update, table, excess_K, sensitivities)
    max_norm = update.summary["max_grad_norm"]
    found = taken_step(changed.coefficients, processor, shards, checkpoint, execution, max_norm, changed.altered)
    covectors = {kind: [gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS}
    if reward_gradient is not None:
        covectors["reward"] = [reward_gradient.vector(f"reward_{half}") for half in HALVES]
    along = {kind: [0.0 for _ in HALVES] for kind in covectors}
    for block, v in found.blocks():
        for kind, of_halves in covectors.items():
            for half, file in enumerate(of_halves):
                along[kind][half] += float((v * file.block(block).to(v.device).double()).sum())
    products = {kind: along[kind] for kind in KINDS}
    of_reward = {"reward": along.get("reward", [])}
    return {"products": products} | of_reward | {"gradient_norm": found.gradient_norm, "clip_factor": found.clip_factor}
