"""What E cannot know: the share of steps to tokens that it never took, and what they could hold."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch

from entropy_core.estimates.selection import Row
from entropy_core.numerics import ragged
from entropy_core.numerics.unseen import COMMON, ENOUGH, MATERIAL, Steps, Unseen, states_before, unseen
from entropy_core.numerics.weights import prefix_weights
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact

MOST_STEPS = 2**22
"""Steps in memory at a time; a larger E is read once for each part of its states."""


def unseen_of(scores: "Sequence[Artifact]", max_new_tokens: int) -> Unseen:
    """Sum the probabilities of tokens that E never took, over its steps.

    Args:
        scores: shards of score-e-batch.
        max_new_tokens: maximum response length of E.

    Returns:
        The sums.
    """
    parts = -(-sum(shard.summary["tokens"] for shard in scores) // MOST_STEPS)
    blocks = (_joined(list(_steps(scores, max_new_tokens, part, parts))) for part in range(parts))
    return reduce(Unseen.plus, map(unseen, blocks))


def _steps(scores: "Sequence[Artifact]", max_new_tokens: int, part: int, parts: int) -> Iterator[Steps]:
    for shard in scores:
        table = read_tokens([shard], "logprobs", "states", optional=("proposal_logprobs",))
        prompt_ids_N = torch.tensor(shard.table("scores.parquet")["prompt_id"].to_pylist())
        before_K = states_before(prompt_ids_N, table["states"], table.offsets_N1)
        log_q_K = table.columns.get("proposal_logprobs", table["logprobs"])
        weights_K = prefix_weights(log_q_K, table["logprobs"], table.offsets_N1).before_K
        mine_K = before_K % parts == part
        left_K = max_new_tokens - 1 - ragged.position_index(table.offsets_N1)
        columns = before_K, table["states"], table["logprobs"], log_q_K, weights_K, left_K
        yield Steps(*(column_K[mine_K] for column_K in columns))


def _joined(blocks: list[Steps]) -> Steps:
    return Steps(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))


def describe_unseen(found: Unseen, sequences: int, entropy: float, entropy_per_token: float) -> Row:
    """Compute the columns of what E has not seen.

    Args:
        found: sums over the steps of E.
        sequences: number of sequences in E.
        entropy: measured entropy of a response, nats.
        entropy_per_token: entropy that no token exceeds, nats: log V.

    Returns:
        Columns of `estimate_columns.ESTIMATES`.
    """
    share = found.probability / sequences
    return {
        "unseen_share": share,
        "unseen_expected": found.expected,
        "unseen_bound": found.tokens / sequences * entropy_per_token / entropy if entropy > 0 else 0.0,
    }


def cannot_know(row: Row, sequences: int) -> str:
    """Say why E cannot know the entropy; empty if it can.

    Args:
        row: columns of `describe_unseen`.
        sequences: number of sequences in E.

    Returns:
        The reason.
    """
    if row["unseen_expected"] >= min(ENOUGH, COMMON * sequences) or row["unseen_bound"] <= MATERIAL:
        return ""
    return (
        f"E cannot know what follows tokens that it never took: {row['unseen_share']:.2g} of the responses have one, E "
        f"was to meet {row['unseen_expected']:.2g}, and they could hold up to {row['unseen_bound']:.2g} times the "
        "entropy that was measured; draw a part of E from a broader distribution (generation.proposal_temperature)"
    )
