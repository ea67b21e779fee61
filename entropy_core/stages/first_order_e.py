"""first-order-e: ℓ̇ and ḣ of E along v. path-integral: the same further along the step. calibrate: the fast path."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.errors import NonFiniteError
from entropy_core.numerics.path_integral import NODES
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.policy import TeacherForcedRows
from entropy_core.sequence_processor import BatchedSequences, SequenceProcessor
from entropy_core.stages.sequences import Law, as_tangent, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

RMS_CHANGE = 1e-2
"""Of the log-probabilities of tokens, in a central difference: far from rounding and from curvature both."""
LARGEST_DIFFERENCE = 0.05


def first_order_e(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", update: "Artifact", half_width: float
) -> dict[str, Any]:
    """Derivatives of ℓ and h along v for every token of one shard.

    Args:
        out: `tokens.safetensors`: dlogprobs, dentropies, offsets.
        execution: device and micro-batch.
        law: the policy.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        half_width: ε of the central difference; 0 for forward mode.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    batch, direction = read_sequences(sequences), update.tensors("direction.safetensors")
    if half_width:
        dlogprobs_K, dentropies_K = central_difference(processor, batch, direction, half_width)
    else:
        _, _, dlogprobs_K, dentropies_K = forward_mode(processor, batch, direction)
    columns = {"dlogprobs": dlogprobs_K, "dentropies": dentropies_K, "offsets": batch.response_offsets_N1}
    out.tensors(columns, "tokens.safetensors")
    return {"sequences": len(batch)}


def path_integral(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", update: "Artifact", eta: float
) -> dict[str, Any]:
    """ℓ, h and their derivatives along v for every token of one shard, at each node between θ and θ + ηv.

    Args:
        out: `tokens.safetensors`: logprobs_j, entropies_j, dlogprobs_j and dentropies_j of node j, offsets.
        execution: device and micro-batch.
        law: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.
        eta: absolute step size.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    batch, direction = read_sequences(sequences), update.tensors("direction.safetensors")
    columns = {"offsets": batch.response_offsets_N1}
    for j, node in enumerate(NODES):
        with processor.policy.moved(direction, node * eta):
            there = forward_mode(processor, batch, direction)
        columns |= {f"{name.removesuffix('_K')}_{j}": column_K for name, column_K in there._asdict().items()}
    out.tensors(columns, "tokens.safetensors")
    return {"sequences": len(batch)}


def calibrate(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Sequence[Artifact]", count: int, update: "Artifact"
) -> dict[str, Any]:
    """The ε of the central difference along v, and how far it is from forward mode on some sequences.

    ε is such that the log-probability of a token changes by `RMS_CHANGE`; between directions it differs a hundredfold.

    Args:
        out: not written to.
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-e-batch that hold the sequences.
        count: how many sequences to compare on.
        update: artifact of compute-update.

    Returns:
        `half_width` ε, and `difference` of ℓ̇ and ḣ from forward mode, relative to it (rms over tokens, the larger one).

    Raises:
        NonFiniteError: the difference is more than 5 %.
    """
    processor = processor_of(law, execution)
    direction = update.tensors("direction.safetensors")
    parts = [batch.select(torch.arange(min(count, len(batch)))) for batch in map(read_sequences, sequences)]
    by_forward_mode = [forward_mode(processor, part, direction)[2:] for part in parts]
    exact = [torch.cat(columns).double() for columns in zip(*by_forward_mode, strict=True)]
    spread = float(exact[0].square().mean().sqrt())
    half_width = RMS_CHANGE / spread if spread else 1.0
    by_difference = [central_difference(processor, part, direction, half_width) for part in parts]
    found = [torch.cat(columns) for columns in zip(*by_difference, strict=True)]
    misses = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True) if float(e.norm())]
    difference = max(misses, default=0.0)
    if difference > LARGEST_DIFFERENCE:
        raise NonFiniteError(
            f"the central difference misses forward mode by {difference:.0%}",
            cause="the policy bends too strongly along this step, or rounds too coarsely, for a finite difference",
            way_out="set policy.derivative: forward_mode",
        )
    return {"half_width": half_width, "difference": difference}


def forward_mode(
    processor: SequenceProcessor, batch: BatchedSequences, direction: dict[str, Tensor]
) -> TokenDerivatives:
    """ℓ, h, ℓ̇ and ḣ of every token along `direction`, each [K], by one forward-mode pass."""
    tangent = as_tangent(direction, processor.policy)

    def derivatives(rows: TeacherForcedRows) -> TokenDerivatives:
        return processor.policy.derivatives(rows, tangent, processor.config.temperature)

    return TokenDerivatives(*processor.map_tokens(batch, derivatives))


def central_difference(
    processor: SequenceProcessor, batch: BatchedSequences, direction: dict[str, Tensor], half_width: float
) -> tuple[Tensor, Tensor]:
    """ℓ̇ and ḣ of every token, float64 [K], as (f(θ + εv) − f(θ − εv))/2ε: two forward passes."""
    with processor.policy.moved(direction, half_width):
        above, _ = processor.score(batch)
    with processor.policy.moved(direction, -half_width):
        below, _ = processor.score(batch)
    dlogprobs_K = (above.logprobs_K.double() - below.logprobs_K.double()) / (2 * half_width)
    return dlogprobs_K, (above.entropies_K.double() - below.entropies_K.double()) / (2 * half_width)
