"""load-checkpoint: the optimizer's state by name. load-prompts: a pool of prompts."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.checkpoints import read_checkpoint
from entropy_core.prompts import load_pool
from entropy_core.stages.files import user_file

if TYPE_CHECKING:
    from entropy_core.artifact import Writer
    from entropy_core.execution import Execution


def load_checkpoint(
    out: "Writer", execution: "Execution", *, checkpoint: str, base: str, learning_rate: float, optimizer_state: str
) -> dict[str, Any]:
    """Persist Adam's moments and hyperparameters by parameter name.

    Args:
        out: `moments.safetensors` (exp_avg/…, exp_avg_sq/…, max_exp_avg_sq/…), `parameters.parquet`, `groups.json`.
        execution: knows where it lies.
        checkpoint: content digest of the checkpoint's files.
        base: content digest of the base model under an adapter; empty for a full model.
        learning_rate: takes the place of the saved one; 0 keeps the saved one.
        optimizer_state: `checkpoint`, or `fresh` before the first step.

    Returns:
        Step, nominal learning rate, how many tensors are trained and how many numbers they hold, how many of them have
        their slot, and what was assumed.
    """
    found = read_checkpoint(
        execution.paths[checkpoint],
        learning_rate or None,
        execution.paths[base] if base else "",
        fresh=optimizer_state == "fresh",
    )
    optimizer = found.optimizer
    slots = {
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
        "max_exp_avg_sq": optimizer.max_exp_avg_sq,
    }
    out.tensors(
        {f"{slot}/{name}": tensor for slot, by_name in slots.items() for name, tensor in by_name.items()},
        "moments.safetensors",
    )
    groups = [
        {
            "beta1": group.beta1,
            "beta2": group.beta2,
            "eps": group.eps,
            "weight_decay": group.weight_decay,
            "relative_lr": group.lr / optimizer.learning_rate,
            "maximize": group.maximize,
            "decoupled": group.decoupled,
            "parameters": {name: optimizer.step[name] for name in group.names},
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
        "assumptions": list(found.assumptions),
    }


def load_prompts(
    out: "Writer", execution: "Execution", *, dataset_name: str, split: str, prompt_column: str, source: str
) -> dict[str, Any]:
    """Persist one split of a dataset.

    Args:
        out: `prompts.parquet`.
        execution: knows where the file lies.
        dataset_name: see `prompts.load_pool`.
        split: which split.
        prompt_column: which column holds the prompt.
        source: digest of the file behind the dataset, empty for one that is code.

    Returns:
        The number of prompts.
    """
    pool = load_pool(str(user_file(execution, source)) if source else dataset_name, split, prompt_column)
    out.table(pool, "prompts.parquet")
    return {"prompts": pool.num_rows}
