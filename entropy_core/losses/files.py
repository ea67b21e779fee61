"""Save the loss's inputs and gradient in compute-update, and load them in the attribution stages.

ℓ is the log-probability of a token and h the entropy of its distribution, both in nats; U is the update batch, K its
number of tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_core.files import functions as user_functions
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.store.columns import TokenTable, as_numbers, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer


_FILE = "loss.safetensors"
RECORDED = "recorded_advantage"
"""Column of the trainer's own advantages, where U was recorded with them."""


def name_of(execution: "Execution", loss: str, source: str) -> str:
    """Return the name by which a loss can be loaded.

    Args:
        execution: maps the digests of user files to their paths.
        loss: name of a built-in loss, or `function` or `package.module:function` for a user's loss.
        source: digest of the user's file; empty for a built-in loss.

    Returns:
        The name, as `functions.load_loss` takes it.
    """
    return user_functions.in_file(loss, execution.paths[source] if source else None)


def write_tokens(out: "Writer", tokens: TokenTable, coefficients: TokenPair) -> None:
    """Write the per-token inputs of a loss and its gradient to `loss.safetensors`.

    Args:
        out: writer of the compute-update artifact.
        tokens: columns logprobs and entropies, and reference_logprobs if the loss has a KL term.
        coefficients: gradient of the loss with respect to ℓ and h of every token, each [K].
    """
    gradient = {"coefficient": coefficients.logprob_K, "entropy_coefficient": coefficients.entropy_K}
    tokens.join(TokenTable(tokens.sequences_N, tokens.offsets_N1, gradient)).write(out, _FILE)


def read_batch(update: "Artifact", sequences: TokenTable) -> tuple[LossBatch, TokenPair]:
    """Load U with the inputs that the loss of the step had.

    Args:
        update: artifact of compute-update.
        sequences: token table of the sequences of U.

    Returns:
        The batch, and the gradient of the loss with respect to ℓ and h of every token, each [K].

    Raises:
        StoreError: the step was computed from other sequences.
    """
    whole, coefficients = _read(update, sequences)
    return whole.batch(), coefficients


def read_parts(update: "Artifact", sequences: TokenTable, parts_P: Sequence[Tensor]) -> list[LossBatch]:
    """Load some of the prompts of U as if they were all, with the advantages and denominators that they then have.

    Args:
        update: artifact of compute-update.
        sequences: token table of the sequences of U.
        parts_P: whether each prompt is in a part, bool [P].

    Returns:
        The batch of each part.

    Raises:
        StoreError: the step was computed from other sequences.
    """
    whole, _ = _read(update, sequences)
    return [whole.batch(part_P) for part_P in parts_P]


def read_with(update: "Artifact", sequences: TokenTable, specs: Sequence[LossSpec]) -> list[LossBatch]:
    """Load U as each of several losses would have it, in place of the loss of the step.

    Args:
        update: artifact of compute-update.
        sequences: token table of the sequences of U.
        specs: the losses; none with a KL term where the step has none.

    Returns:
        The batch of each loss.

    Raises:
        StoreError: the step was computed from other sequences.
    """
    whole, _ = _read(update, sequences)
    return [whole.under(spec).batch() for spec in specs]


class _Inputs(NamedTuple):
    """What the loss of a step was made of."""

    spec: LossSpec
    tokens: TokenTable
    rewards_PG: Tensor
    truncated_N: Tensor
    recorded_PG: Tensor | None  # advantages of the trainer

    def batch(self, part_P: Tensor | None = None) -> LossBatch:
        """U, or the part of it that answers some of the prompts."""
        if part_P is None:
            return self.spec.batch(self.tokens, self.rewards_PG, self.truncated_N, self.recorded_PG)
        chosen_N = part_P.repeat_interleave(self.rewards_PG.shape[1]).nonzero().squeeze(1)
        recorded_PG = None if self.recorded_PG is None else self.recorded_PG[part_P]
        tokens = self.tokens.select(chosen_N)
        return self.spec.batch(tokens, self.rewards_PG[part_P], self.truncated_N[chosen_N], recorded_PG)

    def under(self, spec: LossSpec) -> "_Inputs":
        """The same under another loss; the trainer's advantages stay where it makes them of rewards in the same way."""
        recorded_PG = self.recorded_PG if spec.rule_of_advantages == self.spec.rule_of_advantages else None
        return self._replace(spec=spec, recorded_PG=recorded_PG)


def _read(update: "Artifact", sequences: TokenTable) -> tuple[_Inputs, TokenPair]:
    spec, table = LossSpec(**update.summary["loss"]), update.table("sequences.parquet")
    names = ["logprobs", "entropies", "coefficient", "entropy_coefficient"]
    names += ["reference_logprobs"] if spec.kl_beta else []
    tokens = sequences.join(read_tokens([update], *names, file=_FILE, optional=("old_logprobs",)))
    rewards_PG = as_numbers(table[spec.reward_column].to_pylist()).view(update.summary["prompts"], -1)
    truncated_N = torch.tensor(table["truncated"].to_pylist())
    coefficients = TokenPair(tokens["coefficient"], tokens["entropy_coefficient"])
    recorded_PG = None
    if RECORDED in table.column_names:
        recorded_PG = as_numbers(table[RECORDED].to_pylist()).view_as(rewards_PG)
    return _Inputs(spec, tokens, rewards_PG, truncated_N, recorded_PG), coefficients
