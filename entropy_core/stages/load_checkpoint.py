"""load-checkpoint: index the optimizer's state by parameter name."""

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.optimizer_state import check_moments
from entropy_core.files.checkpoint import optimizer_digest
from entropy_core.numerics.adamw import AdamHyperparameters
from entropy_core.numerics.rules import RULES

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer


def load_checkpoint(
    out: "Writer",
    execution: "Execution",
    *,
    checkpoint: str,
    base: str,
    learning_rate: float,
    optimizer_state: str,
    weights: str,
) -> dict[str, Any]:
    """Write the inputs of the next step by parameter name, except the moments, which stay in the trainer's file.

    Args:
        out: writer of `parameters.parquet` (the group is null where the trainer does not move the parameter) and
            `groups.json` (rule, hyperparameters and moments of each group; of each parameter the step count, the slot
            in `optimizer.pt`, and the dtype that it has in the trainer if that is narrower than float32).
        execution: path of the checkpoint.
        checkpoint: content digest of the checkpoint's files.
        base: content digest of an adapter's base model; empty for a full model.
        learning_rate: replaces the saved learning rate; 0 keeps the saved one.
        optimizer_state: `checkpoint`, or `fresh` before the first step.
        weights: `master` for those of the shards in any case, else `trained`.

    Returns:
        Summary: step, nominal learning rate, number of trained tensors and of numbers that move, number of tensors with
        a slot and of those that do not move, digest of `optimizer.pt` (empty if fresh), why its
        rule allows no interval over U (empty if it may), and assumptions.
    """
    found = read_checkpoint(
        execution.paths[checkpoint],
        learning_rate or None,
        execution.paths[base] if base else "",
        fresh=optimizer_state == "fresh",
        masters=weights == "master",
    )
    optimizer, file = found.optimizer, found.layout.optimizer
    if file is not None:
        check_moments(file, optimizer)
    groups = [
        {
            "rule": group.rule,
            "hyperparameters": group.hyperparameters._asdict(),
            "moments": list(group.moments),
            "fused": group.fused,
            "parameters": {
                name: [optimizer.step[name], optimizer.slot.get(name), found.narrow.get(name, "")]
                for name in group.names
            },
        }
        for group in optimizer.groups
    ]
    # what the trainer does not move has a step of length 0
    still = AdamHyperparameters(beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, relative_lr=0.0)
    unmoved = {name: [0, None, ""] for name in optimizer.unmoved}
    rest = {
        "rule": "adamw",
        "hyperparameters": still._asdict(),
        "moments": ["exp_avg", "exp_avg_sq"],
        "fused": False,
        "parameters": unmoved,
    }
    out.json(groups + [rest] * bool(unmoved), "groups.json")
    group_of = {name: index for index, group in enumerate(optimizer.groups) for name in group.names}
    names = list(found.parameter_shapes)
    out.table(
        pa.table(
            {
                "name": names,
                "shape": [list(found.parameter_shapes[name]) for name in names],
                "group": [group_of.get(name) for name in names],
                "optimizer_step": [optimizer.step.get(name, 0) for name in names],
            }
        ),
        "parameters.parquet",
    )
    return {
        "step": found.step,
        "learning_rate": optimizer.learning_rate,
        "parameters": sum(math.prod(found.parameter_shapes[name]) for name in optimizer.step),
        "trained": len(found.parameter_shapes),
        "matched": len(optimizer.step),
        "unmoved": len(optimizer.unmoved),
        "optimizer": optimizer_digest(file) if file else "",
        "no_interval": next((RULES[of.rule].no_interval for of in optimizer.groups if RULES[of.rule].no_interval), ""),
        "assumptions": list(found.assumptions),
    }
