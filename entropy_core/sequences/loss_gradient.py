"""The gradient of the loss on the update batch U, with the norms of DoRA's layers held as the trainer does."""

from collections.abc import Iterable

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
    """Add Σ_k (c_k ∇ℓ_k + d_k ∇h_k) over the tokens of U, by backward passes.

    There is no pass over a sequence whose coefficients are all 0, as those of a prompt whose responses are equally
    rewarded.

    Args:
        into: accumulators by parameter name, float64.
        processor: the policy that sampled U.
        shards: the sequences of U.
        coefficients: c_k and d_k of the loss, each float64 [K], K tokens in the order of the shards.
    """
    policy, start = processor.policy, 0
    with held_norms(policy.model):
        for shard in shards:
            stop = start + len(shard.response_tokens_K)
            of_shard = [values_K[start:stop] for values_K in coefficients]
            counts_K = (of_shard[0] != 0) | (of_shard[1] != 0)
            chosen_N = ragged.sequence_sum(counts_K.double(), shard.response_offsets_N1) > 0
            chosen_K = chosen_N.repeat_interleave(shard.lengths_N)
            for index_K, rows in processor.micro_batches(shard.select(chosen_N.nonzero().squeeze(1))):
                weights = Coefficients(*(values_K[chosen_K][index_K] for values_K in of_shard))
                policy.add_gradients(rows, [weights], processor.config.temperature, [into])
            start = stop
