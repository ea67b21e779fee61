"""load-prompts: a pool of prompts, as tokens."""

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
        dataset_name: see `prompts.pools.load_pool`; empty for a file of the user.
        options: of a task of reasoning-gym.
        split: which split.
        prompt_column: which column holds the prompt.
        source: digest of the file or folder behind the dataset, empty for one that is made.
        revision: commit of the dataset on the hub, empty where it is not known.
        library: the one that makes the dataset, empty for one that no library makes.
        tokenizer: digest of the tokenizer's files.
        encoding: see `prompts.tokens.encode`.

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
