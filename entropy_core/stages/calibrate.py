"""calibrate: how wide a central difference along v has to be, and what it misses."""

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
"""Of the log-probabilities of tokens: how wide a central difference may be. Wider ones bend, narrower ones round."""
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
    """The ε of the central difference along v, and how far it is from forward mode on some sequences.

    Each ε that is tried makes the log-probabilities of tokens change by one of `RMS_CHANGES`; between directions it
    differs a hundredfold. The one that comes closest to forward mode is taken.

    Args:
        out: not written to.
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: the shards of sample-e-batch that hold the sequences.
        count: how many sequences to compare on.
        update: artifact of compute-update.

    Returns:
        `half_width` ε, and `difference` of ℓ̇ and ḣ from forward mode, relative to it (rms over tokens, the larger one).

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
