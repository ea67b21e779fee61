"""reward-shares-u: what each token of U did to the expected reward, beside what it did to the entropy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.losses.files import read_batch
from entropy_core.numerics.halves import HALVES, of_all
from entropy_core.numerics.vectors import dots, times
from entropy_core.policy.spec import PolicySpec
from entropy_core.policy.vectors import stored_vector
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, RewardGradient, SequencesOfU, Update


def reward_shares_u(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "RewardGradient",
) -> dict[str, Any]:
    """Split δJ₁ as first-order-u splits δH₁: c_k⟨Pᵀ∇J, ∇ℓ_k⟩ + d_k⟨Pᵀ∇J, ∇h_k⟩ for every token.

    Args:
        out: writer of `tokens.parquet`, a row per U token: `sequence_id`, and `share_0` and `share_1`, by ∇J of each
            half of E, in reward per unit step.
        execution: device and micro-batch.
        policy: whose sequences they are.
        sequences: shards of the sequences of U.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        gradient: artifact of reward-gradient.

    Returns:
        ⟨∇J, v⟩, and its parts from momentum and decay, in reward per unit step.
    """
    processor = processor_of(policy, execution)
    model, shards = processor.policy, [read_sequences(shard) for shard in sequences]
    of_u, settings = tokens_of(shards), update.summary
    _, coefficients = read_batch(update, of_u)

    loss_gradient, direction = (stored_vector(update.vector(name), model) for name in ("gradient", "direction"))
    step = OptimizerStep(checkpoint, execution, model.named_parameters(), loss_gradient, settings["clip_factor"])
    covectors = [stored_vector(gradient.vector(f"reward_{half}"), model) for half in HALVES]
    columns: dict[str, Any] = {
        "sequence_id": [i for shard in shards for i in shard.sequence_ids_N.repeat_interleave(shard.lengths_N).tolist()]
    }
    for half, covector in zip(HALVES, covectors, strict=True):
        pair = token_sensitivities(
            processor, shards, times(settings["clip_factor"], step.applied("preconditioned", covector))
        )
        columns[f"share_{half}"] = coefficients.dot(pair).tolist()
    out.table(pa.table(columns), "tokens.parquet")
    halves = gradient.summary["halves"]
    parts = [
        dots([(covector, part) for covector in covectors])
        for part in (direction, step.part("momentum"), step.part("decay"))
    ]
    of_both = [float(of_all(halves, list(torch.tensor(part, dtype=torch.float64)))) for part in parts]
    return dict(zip(("inner_product", "momentum", "decay"), of_both, strict=True))
