"""load-prompts: load and tokenize a pool of prompts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.prompts.pools import load_pool
from entropy_core.prompts.tokens import encode

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer


def load_prompts(
    out: "Writer",
    execution: "Execution",
    *,
    dataset_name: str,
    options: Mapping[str, Any],
    configuration: str,
    split: str,
    prompt_column: str,
    source: str,
    revision: str,
    library: str,
    tokenizer: str,
    encoding: Mapping[str, Any],
) -> dict[str, Any]:
    """Write one split of a dataset, and the token ids of its prompts.

    Args:
        out: writer of `prompts.parquet`, and of `prompt_tokens.parquet` with one row of token ids per prompt.
        execution: paths of the files.
        dataset_name: name of the dataset, as in `prompts.pools.load_pool`; empty for a user's file or folder.
        options: options of a reasoning-gym task.
        configuration: name of a configuration of a folder or of a dataset of the hub; empty for the only one.
        split: name of the split.
        prompt_column: column with the prompt.
        source: digest of the dataset's file or folder; empty for a generated dataset.
        revision: hub commit of the dataset; empty if unknown.
        library: library that generates the dataset, with its version; empty if none does.
        tokenizer: digest of the tokenizer's files.
        encoding: keyword arguments of `prompts.tokens.encode`.

    Returns:
        Summary: number of prompts, and notes for the report.
    """
    path = execution.paths[source] if source else None
    pool = load_pool(dataset_name or str(path), split, prompt_column, path, options, configuration)
    pool, token_ids = encode(pool, load_tokenizer(execution.paths[tokenizer]), **encoding)
    out.table(pool.table, "prompts.parquet")
    out.table(pa.table({"token_ids": token_ids}), "prompt_tokens.parquet")
    notes = [f"Split `{split}`: {note}." for note in pool.notes]
    if revision or library:
        notes.append(f"Prompts of `{dataset_name}`: {library or f'revision {revision}'}.")
    return {"prompts": pool.table.num_rows, "notes": notes}
