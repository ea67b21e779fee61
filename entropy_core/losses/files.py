"""The loss and what it was taken of, from the stage that takes the step to those that ask what was in it."""

from typing import TYPE_CHECKING

import torch

from entropy_core.files import functions as user_functions
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch, Objective
from entropy_core.store.columns import TokenTable, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


_FILE = "loss.safetensors"


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


def write_tokens(out: "Writer", tokens: TokenTable, coefficients: TokenPair) -> None:
    """Persist what a loss read of each token and its gradient there, `loss.safetensors`.

    Args:
        out: of compute-update.
        tokens: logprobs, entropies, and reference_logprobs with a KL term.
        coefficients: the gradient with respect to ℓ and h of every token, [K].
    """
    gradient = {"coefficient": coefficients.logprob_K, "entropy_coefficient": coefficients.entropy_K}
    tokens.join(TokenTable(tokens.sequences_N, tokens.offsets_N1, gradient)).write(out, _FILE)


def read_batch(update: "Artifact", sequences: TokenTable) -> tuple[LossBatch, TokenPair]:
    """U as the loss of a step saw it.

    Args:
        update: artifact of compute-update.
        sequences: those of U.

    Returns:
        The batch; and the gradient of the loss with respect to ℓ and h of every token, as that batch has them, [K].

    Raises:
        StoreError: the step was taken on other sequences.
    """
    summary, table = update.summary, update.table("sequences.parquet")
    names = ["logprobs", "entropies", "coefficient", "entropy_coefficient"]
    names += ["reference_logprobs"] if summary["kl_beta"] else []
    tokens = sequences.join(read_tokens([update], *names, file=_FILE))
    advantages_PG, rewards_PG = (
        torch.tensor(table[name].to_pylist(), dtype=torch.float64).view(summary["prompts"], -1)
        for name in ("advantage", "reward")
    )
    batch = LossBatch.on_policy(
        tokens["logprobs"],
        tokens["entropies"],
        tokens.offsets_N1,
        advantages_PG,
        rewards_PG,
        max_new_tokens=summary["max_new_tokens"],
        reference_logprobs_K=tokens.columns.get("reference_logprobs"),
        objective=Objective(kl_beta=summary["kl_beta"]),
    )
    return batch, TokenPair(tokens["coefficient"], tokens["entropy_coefficient"])
