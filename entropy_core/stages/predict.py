"""predict: what the exact step v' of the optimizer under an intervention does to the entropy, to first order."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entropy_core.losses.changed import changed_by, excess_of
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.taken_step import TakenStep, taken_steps
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
    from entropy_core.store.tensor_file import TensorFile


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
    interventions: Sequence[InterventionSpec],
) -> dict[str, Any]:
    """Compute ⟨∇H, v'⟩ with ∇H of each half of E for some interventions. Each costs a backward pass over U.

    They share the forward pass, as far as there is room for their gradients. No v' is kept.

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
        interventions: what is tried.

    Returns:
        `predictions`, by label of the intervention: `products`, ⟨∇, v'⟩ by kind, one for each half of E; `reward`, the
        same with ∇J; norm of the gradient, and its clip factor.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]
    table, excess_K = excess_of(scores_u, discriminators_u)
    changes = changed_by(interventions, execution, update, table, excess_K, sensitivities)
    under = [(changed.coefficients, changed.altered) for changed in changes]
    steps = taken_steps(under, processor, shards, checkpoint, execution, update.summary["max_grad_norm"])
    covectors = {kind: [gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS}
    if reward_gradient is not None:
        covectors["reward"] = [reward_gradient.vector(f"reward_{half}") for half in HALVES]
    found = [prediction for some in steps for prediction in _predictions(some, covectors)]
    return {"predictions": {spec.label: prediction for spec, prediction in zip(interventions, found, strict=True)}}


def _predictions(steps: Sequence[TakenStep], covectors: "Mapping[str, Sequence[TensorFile]]") -> list[dict[str, Any]]:
    """What is said of each of several steps, with every block of a covector read once for all of them."""
    along = [{kind: [0.0 for _ in HALVES] for kind in covectors} for _ in steps]
    for pieces in zip(*(step.blocks() for step in steps), strict=True):
        block, device = pieces[0][0], pieces[0][1].device
        of_block = {k: [file.block(block).to(device).double() for file in files] for k, files in covectors.items()}
        for products, (_, v) in zip(along, pieces, strict=True):
            for kind, of_halves in of_block.items():
                for half, w in enumerate(of_halves):
                    products[kind][half] += float((v * w).sum())
    return [
        {"products": {kind: products[kind] for kind in KINDS}, "reward": products.get("reward", [])}
        | {"gradient_norm": step.gradient_norm, "clip_factor": step.clip_factor}
        for step, products in zip(steps, along, strict=True)
    ]
