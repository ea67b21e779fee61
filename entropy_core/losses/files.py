"""The loss and what it was taken of, from the stage that takes the step to those that ask what was in it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.files import functions as user_functions
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.losses import LossBatch

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


def name_of(execution: "Execution", loss: str, source: str) -> str:
    """The name of a loss, by which it can be found.

    Args:
        execution: knows where the file of a user lies.
        loss: its name, that of a user's without the folder.
        source: digest of the user's file; empty for a loss of this package.

    Returns:
        See `functions.load_loss`.
    """
    return user_functions.in_file(loss, execution.paths[source] if source else None)


def write_tokens(out: "Writer", batch: LossBatch, coefficients: TokenPair) -> None:
    """Persist what a loss reads of each token, `loss.safetensors`, and its gradient, `coefficients.safetensors`."""
    columns = {"logprobs": batch.logprobs_K, "entropies": batch.entropies_K, "offsets": batch.offsets_N1}
    if batch.reference_logprobs_K is not None:
        columns["reference_logprobs"] = batch.reference_logprobs_K
    out.tensors(columns, "loss.safetensors")
    out.tensors(coefficients._asdict(), "coefficients.safetensors")


def read_batch(update: "Artifact") -> LossBatch:
    """U as the loss of a step saw it.

    Args:
        update: artifact of compute-update.

    Returns:
        The batch.
    """
    summary, columns = update.summary, update.tensors("loss.safetensors")
    table = update.table("sequences.parquet")
    advantages_PG, rewards_PG = (
        torch.tensor(table[name].to_pylist(), dtype=torch.float64).view(summary["prompts"], -1)
        for name in ("advantage", "reward")
    )
    return LossBatch.on_policy(
        columns["logprobs"],
        columns["entropies"],
        columns["offsets"],
        advantages_PG,
        rewards_PG,
        max_new_tokens=summary["max_new_tokens"],
        reference_logprobs_K=columns.get("reference_logprobs"),
        kl_beta=summary["kl_beta"],
    )


def read_coefficients(update: "Artifact") -> TokenPair:
    """The gradient of the loss with respect to ℓ and h of every token of U, as that batch has them, [K]."""
    columns: dict[str, Tensor] = update.tensors("coefficients.safetensors")
    return TokenPair(**columns)
