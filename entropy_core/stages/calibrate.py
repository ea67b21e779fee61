"""calibrate: compare the derivatives of E along the step v with forward mode in full precision, on a few sequences."""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.errors import NonFiniteError
from entropy_core.numerics.choices import Arithmetic
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.derivatives import central_difference, forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import concatenate

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import SequencesOfE, Update

RMS_CHANGES = (1e-2, 3e-3, 1e-3, 3e-4)
"""Candidate widths, as rms changes of token log-probabilities: wider ones are nonlinear, narrower ones lose digits."""
LARGEST_DIFFERENCE = 0.05


def calibrate(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    count: int,
    update: "Update",
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """Measure the error of the derivatives of ℓ and h along v, and choose the width of central differences.

    With `arithmetic: full` the derivatives are central differences with half-width ε. Candidates for ε change token
    log-probabilities by each of `RMS_CHANGES`, because suitable values differ a hundredfold between directions. The
    candidate closest to forward mode is chosen. In another arithmetic they are forward mode in that arithmetic.

    Args:
        out: writer of `tokens.safetensors`, with columns dlogprobs and dentropies: the derivatives minus those of
            forward mode in full precision (nats per unit of η).
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: shards of sample-e-batch that contain the first `count` sequences.
        count: number of sequences to compare on.
        update: artifact of compute-update, which holds v.
        arithmetic: of the derivatives to compare with forward mode in full precision.

    Returns:
        Summary: number of `sequences`; `arithmetic`; `half_width` ε, 0 for forward mode; and `difference`, the rms
        error over tokens relative to forward mode in full precision, of ℓ̇ or ḣ, whichever is larger.

    Raises:
        NonFiniteError: the difference of central differences is more than 5 %.
    """
    processor = processor_of(policy, execution)
    direction = update.vector("direction")
    parts = [batch.select(torch.arange(min(count, len(batch)))) for batch in map(read_sequences, sequences)]

    def by_forward_mode(arithmetic: Arithmetic) -> Tensor:
        return torch.cat([torch.stack(forward_mode(processor, part, direction, arithmetic)[2:]) for part in parts], 1)

    def by_difference(half_width: float) -> Tensor:
        of_parts = [central_difference(processor, part, direction, half_width) for part in parts]
        return torch.cat([torch.stack(of_part) for of_part in of_parts], 1)

    exact_2K, half_width = by_forward_mode("full").double(), 0.0
    if arithmetic == "full":
        difference, half_width, found_2K = min(
            ((_relative(found, exact_2K), width, found) for width, found in _tried(by_difference, exact_2K)),
            key=itemgetter(0),
        )
        if difference > LARGEST_DIFFERENCE:
            raise NonFiniteError(
                f"the central difference misses forward mode by {difference:.0%}",
                cause="the policy bends too strongly along this step, or rounds too coarsely, for a finite difference",
                fix="set policy.derivative: forward_mode",
            )
    else:
        found_2K = by_forward_mode(arithmetic).double()
        difference = _relative(found_2K, exact_2K)
    errors = (found_2K - exact_2K).split([len(part.response_tokens_K) for part in parts], 1)
    tables = [
        part.table(dict(zip(("dlogprobs", "dentropies"), of_part, strict=True)))
        for part, of_part in zip(parts, errors, strict=True)
    ]
    table = concatenate(tables).first(count)
    table.write(out)
    return {
        "sequences": len(table.sequences_N),
        "arithmetic": arithmetic,
        "half_width": half_width,
        "difference": difference,
    }


def _tried(by_difference: Callable[[float], Tensor], exact_2K: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Central differences of all candidate widths."""
    spread = float(exact_2K[0].square().mean().sqrt())
    for width in [change / spread for change in RMS_CHANGES] if spread else [1.0]:
        yield width, by_difference(width)


def _relative(found_2K: Tensor, exact_2K: Tensor) -> float:
    """The rms error of ℓ̇ or ḣ relative to itself, whichever is larger; 0 where nothing moves."""
    pairs = zip(found_2K, exact_2K, strict=True)
    return max((float((f - e).norm() / e.norm()) for f, e in pairs if float(e.norm())), default=0.0)
