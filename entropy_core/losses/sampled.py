"""What the loss is given of a batch that was sampled, scored and rewarded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.losses.spec import LossSpec
from entropy_core.sequences.batch import BatchedSequences, require_ids, tokens_of
from entropy_core.store.columns import TokenTable, as_numbers, read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact


def sampled_batch(
    loss: LossSpec,
    shards: Sequence[BatchedSequences],
    rewards: "Artifact",
    scores: "Sequence[Artifact]",
    reference: "Sequence[Artifact]",
    responses_per_prompt: int,
) -> tuple[TokenTable, Tensor, Tensor]:
    """Put together what `LossSpec.batch` takes.

    Args:
        loss: says which reward counts.
        shards: the sequences.
        rewards: artifact of reward-u-batch; rewards of other sequences are refused.
        scores: shards of score-u-batch.
        reference: shards of score-u-reference; empty without a KL term.
        responses_per_prompt: G.

    Returns:
        The tokens with `logprobs`, `entropies` and, with a reference, `reference_logprobs`, in nats; the rewards,
        float64 [P, G]; and which responses were cut, bool [N].
    """
    rewarded = rewards.table("rewards.parquet")
    require_ids(shards, rewarded["sequence_id"].to_pylist())
    rewards_PG = as_numbers(rewarded[loss.reward_column].to_pylist()).view(-1, responses_per_prompt)
    table = tokens_of(shards).join(read_tokens(scores, "logprobs", "entropies"))
    if reference:
        table = table.join(read_tokens(reference, "logprobs").named({"logprobs": "reference_logprobs"}))
    truncated_N = torch.tensor([reason == "length" for shard in shards for reason in shard.finish_reasons])
    return table, rewards_PG, truncated_N
