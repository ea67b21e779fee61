"""Sequences and what is known of their tokens, flat with offsets; the micro-batches that a policy is given of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.decoding import FinishReason
from entropy_core.errors import NonFiniteError
from entropy_core.numerics import ragged
from entropy_core.scorer import TeacherForcedRows


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

    def __len__(self) -> int:
        return len(self.sequence_ids_N)

    @property
    def lengths_N(self) -> Tensor:
        """Response lengths T, int64, the EOS token counted."""
        return ragged.lengths(self.response_offsets_N1)

    def select(self, chosen_B: Tensor) -> "BatchedSequences":
        """Some of the sequences, in the given order."""
        prompts, responses = ([f(i) for i in chosen_B.tolist()] for f in (self.prompt, self.response))
        nothing = self.prompt_tokens[:0]
        return BatchedSequences(
            sequence_ids_N=self.sequence_ids_N[chosen_B],
            prompt_ids_N=self.prompt_ids_N[chosen_B],
            draws_N=self.draws_N[chosen_B],
            prompt_tokens=torch.cat([nothing, *prompts]),
            prompt_offsets_N1=ragged.offsets_from_lengths(ragged.lengths(self.prompt_offsets_N1)[chosen_B]),
            response_tokens_K=torch.cat([nothing, *responses]),
            response_offsets_N1=ragged.offsets_from_lengths(self.lengths_N[chosen_B]),
            finish_reasons=tuple(self.finish_reasons[i] for i in chosen_B.tolist()),
        )

    def prompt(self, i: int) -> Tensor:
        """Token ids of prompt i."""
        return self.prompt_tokens[self.prompt_offsets_N1[i] : self.prompt_offsets_N1[i + 1]]

    def response(self, i: int) -> Tensor:
        """Token ids of response i."""
        return self.response_tokens_K[self.response_offsets_N1[i] : self.response_offsets_N1[i + 1]]


@dataclass(frozen=True)
class LogprobResults:
    """Per response token, flat [K]: ℓ = log π(token) and h = full-softmax entropy of its step, in nats."""

    logprobs_K: Tensor
    entropies_K: Tensor
    offsets_N1: Tensor


@dataclass(frozen=True)
class DiagnosticsResults:
    """Per sequence, float64 [N], in nats: Σℓ, Σh, and the largest surprisal −ℓ of a token."""

    sum_logprobs_N: Tensor
    sum_entropies_N: Tensor
    max_surprisal_N: Tensor


def require_finite(values_K: Tensor, sequences: BatchedSequences) -> None:
    """Stop at the first NaN or infinity.

    Raises:
        NonFiniteError: names the sequence and the position.
    """
    bad_K = ~torch.isfinite(values_K)
    if bad_K.any():
        token = int(bad_K.nonzero()[0])
        i = int(torch.searchsorted(sequences.response_offsets_N1, token, right=True)) - 1
        raise NonFiniteError(
            f"{int(bad_K.sum())} token value(s) are not finite, the first in sequence "
            f"{int(sequences.sequence_ids_N[i])} at position {token - int(sequences.response_offsets_N1[i])}",
            cause="the weights hold a NaN, or the step size is so large that the moved policy overflows",
            way_out="check the checkpoint, or take smaller step sizes",
        )


def teacher_forced_rows(
    sequences: BatchedSequences, chosen: Sequence[int], device: torch.device
) -> tuple[Tensor, TeacherForcedRows]:
    """A micro-batch.

    Args:
        sequences: what to choose from.
        chosen: indices.
        device: where to put it.

    Returns:
        The flat token indices [K] that it covers, on the CPU, and the micro-batch.
    """
    full = [torch.cat([sequences.prompt(i), sequences.response(i)]) for i in chosen]
    prompt_lengths = [len(sequences.prompt(i)) for i in chosen]
    lengths = [len(sequences.response(i)) for i in chosen]
    input_ids_BL = torch.nn.utils.rnn.pad_sequence(full, batch_first=True)  # pads with token 0, which nobody attends
    row_K = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(lengths))
    position_K = torch.cat([torch.arange(p - 1, p - 1 + t) for p, t in zip(prompt_lengths, lengths, strict=True)])
    tokens_K = torch.cat([sequences.response(i) for i in chosen])
    start = sequences.response_offsets_N1
    token_index_K = torch.cat([torch.arange(int(start[i]), int(start[i + 1])) for i in chosen])
    rows = TeacherForcedRows(input_ids_BL, row_K, position_K, tokens_K)
    return token_index_K, TeacherForcedRows(*(tensor.to(device) for tensor in rows))
