"""calibrate: choose the width of central differences along the step v, and measure their error."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.errors import NonFiniteError
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.derivatives import central_difference, forward_mode
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of

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
) -> dict[str, Any]:
    """Choose the half-width ε of central differences along v by comparison with forward mode on a few sequences.

    Candidates for ε change token log-probabilities by each of `RMS_CHANGES`, because suitable values differ a
    hundredfold between directions. The candidate closest to forward mode is chosen.

    Args:
        out: writer of the artifact; unused.
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: shards of sample-e-batch that contain the first `count` sequences.
        count: number of sequences to compare on.
        update: artifact of compute-update, which holds v.

    Returns:
        Summary: `half_width` ε, and `difference`, the rms error over tokens relative to forward mode, of ℓ̇ or ḣ,
        whichever is larger.

    Raises:
        NonFiniteError: the difference is more than 5 %.
    """
    processor = processor_of(policy, execution)
    direction = update.vector("direction")
    parts = [batch.select(torch.arange(min(count, len(batch)))) for batch in map(read_sequences, sequences)]
    by_forward_mode = [forward_mode(processor, part, direction)[2:] for part in parts]
    exact = [torch.cat(columns).double() for columns in zip(*by_forward_mode, strict=True)]
    spread = float(exact[0].square().mean().sqrt())
    tried = []
    for half_width in [change / spread for change in RMS_CHANGES] if spread else [1.0]:
        by_difference = [central_difference(processor, part, direction, half_width) for part in parts]
        found = [torch.cat(columns) for columns in zip(*by_difference, strict=True)]
        misses = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True) if float(e.norm())]
        tried.append((max(misses, default=0.0), half_width))
    difference, half_width = min(tried)
    if difference > LARGEST_DIFFERENCE:
        raise NonFiniteError(
            f"the central difference misses forward mode by {difference:.0%}",
            cause="the policy bends too strongly along this step, or rounds too coarsely, for a finite difference",
            fix="set policy.derivative: forward_mode",
        )
    return {"half_width": half_width, "difference": difference}
