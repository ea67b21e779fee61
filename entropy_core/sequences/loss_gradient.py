"""The gradient of the loss on the update batch U, with the norms of DoRA's layers held as the trainer does."""

from collections.abc import Iterable

from torch import Tensor

from entropy_core.checkpoints.dora import held_norms
from entropy_core.numerics.functional import TokenPair
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import SequenceProcessor


def add_loss_gradient(
    into: dict[str, Tensor], processor: SequenceProcessor, shards: Iterable[BatchedSequences], coefficients: TokenPair
) -> None:
    """Add Σ_k (c_k ∇ℓ_k + d_k ∇h_k) over the tokens of U, by backward passes.

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
            for index_K, rows in processor.micro_batches(shard):
                weights = Coefficients(*(values_K[start:stop][index_K] for values_K in coefficients))
                policy.add_gradients(rows, [weights], processor.config.temperature, [into])
            start = stop
