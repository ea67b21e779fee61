"""Batches of sequences with per-token results, stored flat with offsets, and the micro-batches made from them.

ℓ is the log-probability of a token and h the entropy of the distribution it was drawn from, both in nats.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from entropy_core.errors import NonFiniteError, StoreError
from entropy_core.numerics import ragged
from entropy_core.policy.scorer import TeacherForcedRows
from entropy_core.store.columns import TokenTable, concatenate

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class BatchedSequences:
    """N prompts with one response each. Token ids are flat int64 with offsets [N + 1]."""

    sequence_ids_N: Tensor
    prompt_ids_N: Tensor  # index into the pool
    draws_N: Tensor  # 0 for the first response to a prompt in this batch, 1 for the second, …
    prompt_tokens: Tensor
    prompt_offsets_N1: Tensor
    response_tokens_K: Tensor
    response_offsets_N1: Tensor
    finish_reasons: tuple[FinishReason, ...]
    proposal_logprobs_K: Tensor | None = None  # log q under the law that drew the tokens; None: the policy's own

    def __len__(self) -> int:
        return len(self.sequence_ids_N)

    @property
    def lengths_N(self) -> Tensor:
        """Response lengths T, int64 [N], including the EOS token."""
        return ragged.lengths(self.response_offsets_N1)

    def select(self, chosen_B: Tensor) -> "BatchedSequences":
        """Return the chosen sequences, in the given order."""
        chosen_K, log_q_K = ragged.token_index(self.response_offsets_N1, chosen_B), self.proposal_logprobs_K
        return BatchedSequences(
            sequence_ids_N=self.sequence_ids_N[chosen_B],
            prompt_ids_N=self.prompt_ids_N[chosen_B],
            draws_N=self.draws_N[chosen_B],
            prompt_tokens=self.prompt_tokens[ragged.token_index(self.prompt_offsets_N1, chosen_B)],
            prompt_offsets_N1=ragged.offsets_from_lengths(ragged.lengths(self.prompt_offsets_N1)[chosen_B]),
            response_tokens_K=self.response_tokens_K[chosen_K],
            response_offsets_N1=ragged.offsets_from_lengths(self.lengths_N[chosen_B]),
            finish_reasons=tuple(self.finish_reasons[i] for i in chosen_B.tolist()),
            proposal_logprobs_K=None if log_q_K is None else log_q_K[chosen_K],
        )

    @cached_property
    def identities_N(self) -> Tensor:
        """Identity of each sequence, int64 [N]: 8 bytes of the SHA-256 of its sequence id, prompt and response.

        Tables of per-token numbers can be joined only if these identities are equal.
        """
        prompts, responses = (flat.numpy() for flat in (self.prompt_tokens, self.response_tokens_K))
        prompts_N1, responses_N1 = self.prompt_offsets_N1.tolist(), self.response_offsets_N1.tolist()
        found = []
        for i, sequence_id in enumerate(self.sequence_ids_N.tolist()):  # slices of arrays cost less than of tensors
            prompt, response = prompts[slice(*prompts_N1[i : i + 2])], responses[slice(*responses_N1[i : i + 2])]
            digest = hashlib.sha256(f"{sequence_id}:{len(prompt)}:".encode() + prompt.tobytes() + response.tobytes())
            found.append(int.from_bytes(digest.digest()[:8], "little", signed=True))
        return torch.tensor(found, dtype=torch.int64)

    def table(self, columns: Mapping[str, Tensor]) -> TokenTable:
        """Build a token table from columns [K] with one number per response token."""
        return TokenTable(self.identities_N, self.response_offsets_N1, columns)

    def prompt(self, i: int) -> Tensor:
        """Return the token ids of prompt i."""
        return self.prompt_tokens[self.prompt_offsets_N1[i] : self.prompt_offsets_N1[i + 1]]

    def response(self, i: int) -> Tensor:
        """Return the token ids of response i."""
        return self.response_tokens_K[self.response_offsets_N1[i] : self.response_offsets_N1[i + 1]]


def tokens_of(shards: Sequence[BatchedSequences]) -> TokenTable:
    """Return a token table of the sequences of all shards, without columns."""
    return concatenate([shard.table({}) for shard in shards])


def require_ids(shards: Sequence[BatchedSequences], sequence_ids: Sequence[int]) -> None:
    """Check that the rows of a table belong to the sequences of all shards, in order.

    Raises:
        StoreError: the rows belong to other sequences.
    """
    if [i for shard in shards for i in shard.sequence_ids_N.tolist()] != list(sequence_ids):
        raise StoreError(
            f"a table of {len(sequence_ids)} rows belongs to other sequences than the shards it is joined with",
            cause="artifacts of two batches were mixed, or the store was edited",
            fix="`entropy-probe store verify`, then run the sweep again",
        )


@dataclass(frozen=True)
class LogprobResults:
    """Per response token, flat [K]: ℓ = log π(token) and h = full-softmax entropy, in nats."""

    logprobs_K: Tensor
    entropies_K: Tensor
    offsets_N1: Tensor


@dataclass(frozen=True)
class DiagnosticsResults:
    """Per sequence, float64 [N], in nats: Σℓ, Σh, and the largest surprisal −ℓ of any token."""

    sum_logprobs_N: Tensor
    sum_entropies_N: Tensor
    max_surprisal_N: Tensor


def require_finite(values_K: Tensor, sequences: BatchedSequences) -> None:
    """Check that all token values are finite.

    Raises:
        NonFiniteError: a value is NaN or infinite; names the sequence and position of the first one.
    """
    bad_K = ~torch.isfinite(values_K)
    if bad_K.any():
        token = int(bad_K.nonzero()[0])
        i = int(torch.searchsorted(sequences.response_offsets_N1, token, right=True)) - 1
        raise NonFiniteError(
            f"{int(bad_K.sum())} token value(s) are not finite, the first in sequence "
            f"{int(sequences.sequence_ids_N[i])} at position {token - int(sequences.response_offsets_N1[i])}",
            cause="the weights contain a NaN, or the step size is so large that the moved policy overflows",
            fix="check the checkpoint, or use smaller step sizes",
        )


def teacher_forced_rows(
    sequences: BatchedSequences, chosen_B: Tensor, device: torch.device
) -> tuple[Tensor, TeacherForcedRows]:
    """Build a micro-batch from chosen sequences.

    Args:
        sequences: the batch to choose from.
        chosen_B: indices of the chosen sequences, int64 [B].
        device: device of the micro-batch.

    Returns:
        The flat indices in `sequences` of the micro-batch's tokens, int64 on the CPU, and the micro-batch.
    """
    token_index_K = ragged.token_index(sequences.response_offsets_N1, chosen_B)
    tokens_K = sequences.response_tokens_K[token_index_K]
    prompts_B1, responses_B1 = (
        ragged.offsets_from_lengths(ragged.lengths(offsets_N1)[chosen_B])
        for offsets_N1 in (sequences.prompt_offsets_N1, sequences.response_offsets_N1)
    )
    prompt_lengths_B, row_K = ragged.lengths(prompts_B1), ragged.sequence_index(responses_B1)
    column_K = ragged.position_index(responses_B1) + prompt_lengths_B[row_K]
    longest = int((prompt_lengths_B + ragged.lengths(responses_B1)).max())
    input_ids_BL = tokens_K.new_zeros(len(chosen_B), longest)  # padded with token 0, to which no position attends
    of_prompts = ragged.token_index(sequences.prompt_offsets_N1, chosen_B)
    where = ragged.sequence_index(prompts_B1), ragged.position_index(prompts_B1)
    input_ids_BL[where] = sequences.prompt_tokens[of_prompts]
    input_ids_BL[row_K, column_K] = tokens_K
    rows = TeacherForcedRows(input_ids_BL, row_K, column_K - 1, tokens_K)
    return token_index_K, TeacherForcedRows(*(to_device(tensor, device) for tensor in rows))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; copies to a GPU are asynchronous, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
