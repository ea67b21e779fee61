"""The recipe that this project replaces, written out plainly, to be measured against.

Eager full logits in micro-batches of 8, in the order drawn; for every step size a base pass of its own and a moved one;
ΔH by self-normalised weights of whole sequences; ∂_vH from one backward pass, where the whole of a sequence's entropy
and length multiplies the whole of its score.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_core.numerics import ragged, uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences

MICRO_BATCH = 8


def scored(policy: Policy, batch: BatchedSequences) -> tuple[Tensor, Tensor]:
    """ℓ and h of every token of the batch, each [K]."""
    with torch.no_grad():
        parts = list(_passes(policy, batch))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def entropy_gradient(policy: Policy, batch: BatchedSequences, sum_entropies_N: Tensor) -> list[Tensor]:
    """∇H_seq by one backward pass: Σ_k ∇h_k + (S − S̄) ∇Σ_k ℓ_k, with the mean over the other sequences."""
    parameters = list(policy.named_parameters().values())
    total = [torch.zeros_like(p) for p in parameters]
    N = len(batch)
    centred_N = (sum_entropies_N - sum_entropies_N.mean()) * N / (N - 1)
    start = 0
    for logprobs_K, entropies_K in _passes(policy, batch):
        lengths = batch.lengths_N[start : start + MICRO_BATCH]
        weights_K = torch.repeat_interleave(centred_N[start : start + MICRO_BATCH], lengths).to(logprobs_K)
        start += MICRO_BATCH
        found = torch.autograd.grad((entropies_K + weights_K * logprobs_K).sum() / N, parameters)
        for whole, part in zip(total, found, strict=True):
            whole += part
    return total


def derivative(
    entropies_K: Tensor, dlogprobs_K: Tensor, dentropies_K: Tensor, offsets_N1: Tensor, normalization: Normalization
) -> Estimate:
    """What `entropy_gradient` estimates along v, sequence by sequence: for its standard error."""
    S_N, T_N = ragged.sequence_sum(entropies_K, offsets_N1), ragged.lengths(offsets_N1).double()
    score_N, local_N = ragged.sequence_sum(dlogprobs_K, offsets_N1), ragged.sequence_sum(dentropies_K, offsets_N1)
    N = len(S_N)

    def centred(values_N: Tensor) -> Tensor:
        return (values_N - values_N.mean()) * N / (N - 1)

    columns = {
        ENTROPY: Columns(S_N, local_N + centred(S_N) * score_N, local_N),
        LENGTH: Columns(T_N, centred(T_N) * score_N, torch.zeros_like(T_N)),
    }
    return uncertainty.entropy_derivative(columns, normalization)


def _passes(policy: Policy, batch: BatchedSequences) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(batch), MICRO_BATCH):
        chosen = range(start, min(start + MICRO_BATCH, len(batch)))
        full = [torch.cat([batch.prompt(i), batch.response(i)]) for i in chosen]
        ids_BL = torch.nn.utils.rnn.pad_sequence(full, batch_first=True).to(policy.device)
        logp_BLV = policy.model(input_ids=ids_BL, use_cache=False).logits.log_softmax(-1)
        entropies_BL = -(logp_BLV.exp() * logp_BLV).sum(-1)
        logprobs, entropies = [], []
        for row, i in enumerate(chosen):
            first, count = len(batch.prompt(i)) - 1, len(batch.response(i))
            tokens_T = batch.response(i).to(policy.device)
            logprobs.append(logp_BLV[row, first : first + count].gather(1, tokens_T[:, None])[:, 0])
            entropies.append(entropies_BL[row, first : first + count])
        yield torch.cat(logprobs), torch.cat(entropies)
