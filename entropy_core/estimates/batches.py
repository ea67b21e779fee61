"""Load the evaluation batch E from the artifacts of its shards.

ℓ is the log-probability of a token and h its entropy, in nats; θ are the checkpoint's parameters, v is the step per
unit of learning rate, and θ + ηv are the moved parameters.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch

from entropy_core.errors import StoreError
from entropy_core.estimates.blocks import Kept
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured, Moved, MovedTokens, measured
from entropy_core.numerics.choices import Baseline, Normalization
from entropy_core.numerics.functional import FUNCTIONALS, REWARD, TokenPair, Tokens
from entropy_core.numerics.quadrature import NODES
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.store.columns import TokenTable, as_numbers, concatenate, read_tokens

if TYPE_CHECKING:
    import pyarrow as pa

    from entropy_core.store.artifact import Artifact
    from entropy_core.store.inputs import AtStepSize

_COLUMNS = [[f"{name.removesuffix('_K')}_{j}" for name in TokenDerivatives._fields] for j in range(len(NODES))]
"""Column names of path-integral, one list per node."""


def evaluation_batch(
    scores: "Sequence[Artifact]",
    derivatives: "Sequence[Artifact]",
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    rewards: "Sequence[Artifact]" = (),
) -> tuple[EvaluationBatch, dict[str, Any]]:
    """Load E at θ.

    Args:
        scores: shards of score-e-batch.
        derivatives: shards of first-order-e.
        baseline: baseline of the return-to-go.
        units: independent units, single sequences or all sequences of one prompt.
        rewards: shards of reward-e-batch; then the expected reward is estimated, too.

    Returns:
        The batch, and a summary with the number of sequences and the fraction cut at `max_new_tokens`.
    """
    tables = [shard.table("scores.parquet") for shard in scores]
    prompt_ids_N = torch.tensor([prompt for table in tables for prompt in table["prompt_id"].to_pylist()])
    reasons = [reason for table in tables for reason in table["finish_reason"].to_pylist()]
    of_rewards: Sequence[Artifact | None] = rewards or [None] * len(scores)
    blocks = [partial(_tokens, *shards) for shards in zip(scores, derivatives, of_rewards, strict=True)]
    functionals = (*FUNCTIONALS, REWARD) if rewards else FUNCTIONALS
    batch = EvaluationBatch.of(blocks, prompt_ids_N if units == "prompt" else None, baseline, functionals)
    return batch, {"n_sequences": len(reasons), "truncated_fraction": reasons.count("length") / len(reasons)}


def _tokens(scores: "Artifact", derivatives: "Artifact", rewards: "Artifact | None") -> Tokens:
    table = read_tokens([scores], "logprobs", "entropies", optional=("proposal_logprobs",))
    table = table.join(read_tokens([derivatives], "dlogprobs", "dentropies"))
    along = TokenPair(table["dlogprobs"], table["dentropies"])
    log_q_K = table.columns.get("proposal_logprobs")
    tokens = Tokens(table["logprobs"], table["entropies"], table.offsets_N1, along, log_q_K)
    return tokens if rewards is None else tokens.rewarded(_rewards(rewards, scores))


def _rewards(rewards: "Artifact", scores: "Artifact") -> torch.Tensor:
    """The reward of every response, [N]; raises StoreError where the rewards are of other sequences."""
    found, expected = rewards.table("rewards.parquet"), scores.table("scores.parquet")
    if found["sequence_id"] != expected["sequence_id"]:
        raise StoreError(
            f"rewards of {len(found)} responses are of others than the {len(expected)} that they are to be put beside",
            cause="artifacts of two batches were mixed, or the store was edited",
            fix="`entropy-probe store verify`, then run the sweep again",
        )
    return as_numbers(found["reward"].to_pylist())


def moved_batch(entry: "AtStepSize", sequences: Sequence[TokenTable]) -> Moved:
    """Load E at one step size, θ + ηv.

    Args:
        entry: `eta`, the `shards` of importance, and the shards of path-integral in `path`.
        sequences: the sequences of each shard; artifacts of other sequences are refused.

    Returns:
        A lazy reader of the moved batch.
    """
    shards, path = entry["shards"], entry["path"]

    def load(i: int) -> MovedTokens:
        moved = sequences[i]
        moved = moved.join(read_tokens([shards[i]], "logprobs", "entropies")) if shards else moved
        at_nodes = _at_nodes(moved.join(read_tokens([path[i]], *chain(*_COLUMNS)))) if path else ()
        return MovedTokens(moved.columns.get("logprobs"), moved.columns.get("entropies"), at_nodes)

    return Moved(entry["eta"], Kept([partial(load, i) for i in range(max(len(shards), len(path)))]))


def _at_nodes(table: TokenTable) -> tuple[TokenDerivatives, ...]:
    return tuple(TokenDerivatives(*(table[name] for name in of_node)) for of_node in _COLUMNS)


def rescored_batch(
    batch: EvaluationBatch, sequences: Sequence[TokenTable], rescores: Sequence["Artifact"]
) -> tuple[EvaluationBatch, list[Measured]]:
    """Take the first sequences of E, and compute the terms of the changes that rounding alone makes of them.

    Args:
        batch: E at θ.
        sequences: its sequences, by shard; an artifact of other sequences is refused.
        rescores: draws of rescore-e-batch: ℓ and h of the first sequences with different rounding errors.

    Returns:
        These sequences at θ; and for each draw the terms of the estimator per_decision.
    """
    few = rescores[0].summary["sequences"]
    again, of_few = batch.first(few), concatenate(sequences).first(few)

    def read(rescored: "Artifact") -> Iterator[MovedTokens]:
        columns = of_few.join(read_tokens([rescored], "logprobs", "entropies"))
        counts = [len(tokens.entropies_K) for tokens, _ in again.read()]
        yield from map(MovedTokens, *(columns[name].split(counts) for name in ("logprobs", "entropies")))

    return again, [measured(again, Moved(1.0, partial(read, draw)), "per_decision") for draw in rescores]


def influences(
    of_sequences: "pa.Table", normalization: Normalization, prompts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the influence of each sequence of U on ∂_vH from the table of first-order-u.

    Args:
        of_sequences: `sequences.parquet`.
        normalization: per sequence or per token.
        prompts: P, number of prompts of U.

    Returns:
        With ∇H from all of E, float64 [P, G]; and with ∇H from each half of E, float64 [2, P, G].
    """
    whole, *halves = (
        torch.tensor(of_sequences[f"influence_{normalization}{suffix}"].to_pylist(), dtype=torch.float64)
        for suffix in ("", "_half_0", "_half_1")
    )
    return whole.view(prompts, -1), torch.stack(halves).view(2, prompts, -1)


def halves_of_u(table: "pa.Table", normalization: Normalization) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ∂_vH of the steps on halves of U from the table of half-steps-u.

    Args:
        table: `halves.parquet`.
        normalization: per sequence or per token.

    Returns:
        ∂_vH of both halves of each split, float64 [R, 2], and their numbers of prompts, int64 [R, 2].
    """
    values, prompts = table[f"inner_product_{normalization}"].to_pylist(), table["prompts"].to_pylist()
    return (
        torch.tensor(values, dtype=torch.float64).view(-1, 2),
        torch.tensor(prompts, dtype=torch.int64).view(-1, 2),
    )
