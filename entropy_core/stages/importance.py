"""importance: log-probabilities and entropies of one shard of E under the moved policy θ + ηv."""

from typing import TYPE_CHECKING, Any

from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.moves import moved_by
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import AnyStep, SequencesOfE


def importance(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "SequencesOfE",
    update: "AnyStep",
    eta: float,
) -> dict[str, Any]:
    """Score one shard under θ + ηv by teacher forcing.

    Args:
        out: writer of `tokens.safetensors`, with columns logprobs and entropies, in nats.
        execution: device and micro-batch size.
        policy: the policy at θ.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update, altered-step or phase-step, which holds v.
        eta: step size η; the learning rate gives the trainer's own step.

    Returns:
        Summary: the number of sequences.
    """
    processor = processor_of(policy, execution)
    batch = read_sequences(sequences)
    with moved_by(processor, update, eta):
        results, _ = processor.score(batch)
    batch.table({"logprobs": results.logprobs_K, "entropies": results.entropies_K}).write(out)
    return {"sequences": len(batch)}
