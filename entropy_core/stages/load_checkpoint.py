"""load-checkpoint: the optimizer's state by name."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.optimizer_state import check_moments
from entropy_core.files.digests import file_digest

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer


def load_checkpoint(
    out: "Writer", execution: "Execution", *, checkpoint: str, base: str, learning_rate: float, optimizer_state: str
) -> dict[str, Any]:
    """Persist what Adam's next step needs by parameter name, but for the moments: they stay in the trainer's file.

    Args:
        out: `parameters.parquet`; `groups.json`: hyperparameters, and of each parameter its steps and which slot of the
            file is its own.
        execution: knows where it lies.
        checkpoint: content digest of the checkpoint's files.
        base: content digest of the base model under an adapter; empty for a full model.
        learning_rate: takes the place of the saved one; 0 keeps the saved one.
        optimizer_state: `checkpoint`, or `fresh` before the first step.

    Returns:
        Step, nominal learning rate, how many tensors are trained and how many numbers they hold, how many of them have
        their slot, the digest of `optimizer.pt` (empty where it is fresh), and what was assumed.
    """
    found = read_checkpoint(
        execution.paths[checkpoint],
        learning_rate or None,
        execution.paths[base] if base else "",
        fresh=optimizer_state == "fresh",
    )
    optimizer, file = found.optimizer, found.layout.optimizer
    if file is not None:
        check_moments(file, optimizer)
    groups = [
        {
            "hyperparameters": group.hyperparameters._asdict(),
            "parameters": {name: [optimizer.step[name], optimizer.slot.get(name)] for name in group.names},
        }
        for group in optimizer.groups
    ]
    out.json(groups, "groups.json")
    group_of = {name: index for index, group in enumerate(optimizer.groups) for name in group.names}
    names = list(found.parameter_shapes)
    out.table(
        pa.table(
            {
                "name": names,
                "shape": [list(found.parameter_shapes[name]) for name in names],
                "group": [group_of[name] for name in names],
                "optimizer_step": [optimizer.step[name] for name in names],
            }
        ),
        "parameters.parquet",
    )
    return {
        "step": found.step,
        "learning_rate": optimizer.learning_rate,
        "parameters": sum(tensor.numel() for tensor in optimizer.exp_avg.values()),
        "trained": len(found.parameter_shapes),
        "matched": len(optimizer.exp_avg),
        "optimizer": file_digest(file) if file else "",
        "assumptions": list(found.assumptions),
    }
