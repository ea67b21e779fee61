"""ℓ̇ and ḣ of every token along a direction: by forward mode, or by two forward passes."""

from collections.abc import Mapping

from torch import Tensor

from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.policy import moves
from entropy_core.policy.attention import fused_attention
from entropy_core.policy.derivatives import as_tangent, token_derivatives
from entropy_core.policy.scorer import TeacherForcedRows
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import SequenceProcessor


def forward_mode(
    processor: SequenceProcessor, batch: BatchedSequences, direction: Mapping[str, Tensor]
) -> TokenDerivatives:
    """ℓ, h, ℓ̇ and ḣ of every token along `direction`, each [K], by one forward-mode pass."""
    tangent = as_tangent(direction, processor.policy)

    def derivatives(rows: TeacherForcedRows) -> TokenDerivatives:
        return token_derivatives(processor.policy, rows, tangent, processor.config.temperature)

    return TokenDerivatives(*processor.map_tokens(batch, derivatives))


def central_difference(
    processor: SequenceProcessor, batch: BatchedSequences, direction: Mapping[str, Tensor], half_width: float
) -> tuple[Tensor, Tensor]:
    """ℓ̇ and ḣ of every token, float64 [K], as (f(θ + εv) − f(θ − εv))/2ε: two forward passes.

    Both with the faster attention that has no forward-mode derivative: f is then the same function on both sides.
    """
    with fused_attention(processor.policy):
        with moves.moved(processor.policy, direction, half_width):
            above, _ = processor.score(batch)
        with moves.moved(processor.policy, direction, -half_width):
            below, _ = processor.score(batch)
    dlogprobs_K = (above.logprobs_K.double() - below.logprobs_K.double()) / (2 * half_width)
    return dlogprobs_K, (above.entropies_K.double() - below.entropies_K.double()) / (2 * half_width)
