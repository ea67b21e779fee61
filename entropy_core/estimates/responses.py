"""What is known of each sampled response from cached columns: sums over its tokens, and how it ended.

ℓ is the log-probability of a token and h the entropy of the distribution it was drawn from, both in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact


@dataclass(frozen=True, eq=False)
class Responses:
    """Sums over the tokens of each response, float64 [N], and per-token columns where they are needed.

    Attributes:
        prompts_N: int64, which prompt it answers.
        cut_N: bool, whether it was cut at `max_new_tokens`.
        lengths_N: number of tokens.
        entropy_N: Σh.
        surprisal_N: −Σℓ.
        first_N: h of the first token.
        last_N: h of the last token.
        logprobs_K: ℓ of every token, float64 [K].
        entropies_K: h of every token, float64 [K].
        index_K: int64, the response of each token.
    """

    prompts_N: Tensor
    cut_N: Tensor
    lengths_N: Tensor
    entropy_N: Tensor
    surprisal_N: Tensor
    first_N: Tensor
    last_N: Tensor
    logprobs_K: Tensor
    entropies_K: Tensor
    index_K: Tensor

    def __len__(self) -> int:
        return len(self.prompts_N)

    def chosen(self, keep_N: Tensor) -> "Responses":
        """Some of the responses; `keep_N` is bool [N]."""
        of_tokens = {"logprobs_K", "entropies_K", "index_K"}
        keep_K = keep_N[self.index_K]
        columns = {f.name: getattr(self, f.name)[keep_K if f.name in of_tokens else keep_N] for f in fields(Responses)}
        columns["index_K"] = (keep_N.cumsum(0) - 1)[columns["index_K"]]
        return Responses(**columns)

    def sums(self, values_K: Tensor) -> Tensor:
        """Sum a per-token column over each response, float64 [N]."""
        return torch.zeros_like(self.lengths_N).index_add_(0, self.index_K, values_K)


MOST_TOKENS = 2**22
"""Tokens of E that are enough: with as many, no comparison with a trainer's log is limited by their number."""


def read_responses(scores: "Sequence[Artifact]", most_tokens: float = math.inf) -> Responses:
    """Read the responses of a batch from the shards of score-e-batch or score-u-batch.

    Args:
        scores: the shards; the first is read whatever its size.
        most_tokens: no further shard is read once there are as many.

    Returns:
        The responses, in their order.
    """
    found: list[Responses] = []
    for shard in scores:
        if sum(len(part.logprobs_K) for part in found) < most_tokens:
            found.append(_of_shard(shard))
    return together(found)


def together(parts: Sequence[Responses]) -> Responses:
    """The responses of several batches, one after the other; equal prompts must have equal numbers."""
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Responses)}
    starts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    columns["index_K"] = torch.cat([part.index_K + start for part, start in zip(parts, starts, strict=False)])
    return Responses(**columns)


def responses_of(
    prompts_N: Tensor, cut_N: Tensor, offsets_N1: Tensor, logprobs_K: Tensor, entropies_K: Tensor
) -> Responses:
    """Build responses from their tokens.

    Args:
        prompts_N: int64.
        cut_N: bool.
        offsets_N1: int64 [N + 1]; no response is empty.
        logprobs_K: ℓ, [K].
        entropies_K: h, [K].

    Returns:
        The responses.
    """
    logprobs_K, entropies_K = logprobs_K.double(), entropies_K.double()
    return Responses(
        prompts_N=prompts_N,
        cut_N=cut_N,
        lengths_N=ragged.lengths(offsets_N1).double(),
        entropy_N=ragged.sequence_sum(entropies_K, offsets_N1),
        surprisal_N=-ragged.sequence_sum(logprobs_K, offsets_N1),
        first_N=entropies_K[offsets_N1[:-1]],
        last_N=entropies_K[offsets_N1[1:] - 1],
        logprobs_K=logprobs_K,
        entropies_K=entropies_K,
        index_K=ragged.sequence_index(offsets_N1),
    )


def _of_shard(shard: "Artifact") -> Responses:
    tokens, table = read_tokens([shard], "logprobs", "entropies"), shard.table("scores.parquet")
    return responses_of(
        torch.tensor(table["prompt_id"].to_pylist()),
        torch.tensor([reason == "length" for reason in table["finish_reason"].to_pylist()]),
        tokens.offsets_N1,
        tokens["logprobs"],
        tokens["entropies"],
    )
