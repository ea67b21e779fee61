"""Gradients of losses on the update batch U, with the norms of DoRA's layers held as the trainer does."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from entropy_core.checkpoints.dora import held_norms
from entropy_core.numerics import ragged
from entropy_core.numerics.functional import TokenPair
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import SequenceProcessor


def add_loss_gradient(
    into: dict[str, Tensor], processor: SequenceProcessor, shards: Iterable[BatchedSequences], coefficients: TokenPair
) -> None:
    """Add Σ_k (c_k ∇ℓ_k + d_k ∇h_k) over the tokens of U, by backward passes; see `add_loss_gradients`.

    Args:
        into: accumulators by parameter name, float64.
        processor: the policy that sampled U.
        shards: the sequences of U.
        coefficients: c_k and d_k of the loss, each float64 [K], K tokens in the order of the shards.
    """
    add_loss_gradients([into], processor, shards, [coefficients])


def add_loss_gradients(
    into: Sequence[dict[str, Tensor]],
    processor: SequenceProcessor,
    shards: Iterable[BatchedSequences],
    coefficients: Sequence[TokenPair],
) -> None:
    """Add the gradients of several losses, each to its own accumulators, with forward passes that they share.

    There is no pass over a sequence whose coefficients are all 0, as those of a prompt whose responses are equally
    rewarded. Losses with the same such sequences share a forward pass, so that each gradient is bit for bit what it is
    alone.

    Args:
        into: accumulators of each loss.
        processor: the policy that sampled U.
        shards: the sequences of U.
        coefficients: of each loss.
    """
    policy, start = processor.policy, 0
    with held_norms(policy.model):
        for shard in shards:
            stop = start + len(shard.response_tokens_K)
            of_shard = [[values_K[start:stop] for values_K in pair] for pair in coefficients]
            for chosen_N, members in _by_sequences(of_shard, shard):
                chosen_K = chosen_N.repeat_interleave(shard.lengths_N)
                theirs = [[values_K[chosen_K] for values_K in of_shard[i]] for i in members]
                for index_K, rows in processor.micro_batches(shard.select(chosen_N.nonzero().squeeze(1))):
                    weights = [Coefficients(*(values_K[index_K] for values_K in pair)) for pair in theirs]
                    policy.add_gradients(rows, weights, processor.config.temperature, [into[i] for i in members])
            start = stop


def _by_sequences(of_losses: Sequence[Sequence[Tensor]], shard: BatchedSequences) -> list[tuple[Tensor, list[int]]]:
    """The sequences that have a coefficient, bool [N], and the places of the losses in which it is these."""
    found: list[tuple[Tensor, list[int]]] = []
    for place, (logprob_K, entropy_K) in enumerate(of_losses):
        counts_K = (logprob_K != 0) | (entropy_K != 0)
        chosen_N = ragged.sequence_sum(counts_K.double(), shard.response_offsets_N1) > 0
        same = next((members for known_N, members in found if torch.equal(known_N, chosen_N)), None)
        if same is None:
            found.append((chosen_N, [place]))
        else:
            same.append(place)
    return found
