"""load-checkpoint: the optimizer's state by name. load-prompts: a pool of prompts, as tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.checkpoints import read_checkpoint
from entropy_core.file_digests import file_digest
from entropy_core.optimizer_state import check_moments
from entropy_core.prompt_tokens import encode
from entropy_core.prompts import load_pool
from entropy_core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from entropy_core.artifact import Writer
    from entropy_core.execution import Execution


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
            "beta1": group.beta1,
            "beta2": group.beta2,
            "eps": group.eps,
            "weight_decay": group.weight_decay,
            "relative_lr": group.lr / optimizer.learning_rate,
            "amsgrad": group.amsgrad,
            "maximize": group.maximize,
            "decoupled": group.decoupled,
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


def load_prompts(
    out: "Writer",
    execution: "Execution",
    *,
    dataset_name: str,
    options: Mapping[str, Any],
    split: str,
    prompt_column: str,
    source: str,
    revision: str,
    library: str,
    tokenizer: str,
    encoding: Mapping[str, Any],
) -> dict[str, Any]:
    """Persist one split of a dataset, and its prompts as the policy reads them.

    Args:
        out: `prompts.parquet`, and `prompt_tokens.parquet` with a row of token ids for each of them.
        execution: knows where the files lie.
        dataset_name: see `prompts.load_pool`; empty for a file of the user.
        options: of a task of reasoning-gym.
        split: which split.
        prompt_column: which column holds the prompt.
        source: digest of the file or folder behind the dataset, empty for one that is made.
        revision: commit of the dataset on the hub, empty where it is not known.
        library: the one that makes the dataset, empty for one that no library makes.
        tokenizer: digest of the tokenizer's files.
        encoding: see `prompt_tokens.encode`.

    Returns:
        The number of prompts, and what a reader should know of them.
    """
    path = execution.paths[source] if source else None
    pool = load_pool(dataset_name or str(path), split, prompt_column, path, options)
    pool, token_ids = encode(pool, load_tokenizer(execution.paths[tokenizer]), **encoding)
    out.table(pool.table, "prompts.parquet")
    out.table(pa.table({"token_ids": token_ids}), "prompt_tokens.parquet")
    notes = [f"Split `{split}`: {note}." for note in pool.notes]
    if revision or library:
        notes.append(f"Prompts of `{dataset_name}`: {library or f'revision {revision}'}.")
    return {"prompts": pool.table.num_rows, "notes": notes}
