"""Prompt pools: where E and U draw their prompts from.

A pool is a table with a column `prompt`; its other columns (an answer, say) are passed on to the reward. Known names
are in `POOLS`; anything that ends in `.jsonl` is a file with one JSON object per line.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from entropy_core import arithmetic
from entropy_core.errors import PromptError, one_line

POOLS: dict[str, Callable[[str], list[dict]]] = {"arithmetic": arithmetic.problems}


def load_pool(dataset_name: str, split: str, prompt_column: str = "prompt") -> pa.Table:
    """The prompts of one split.

    Args:
        dataset_name: a name in `POOLS`, or the path of a `.jsonl` file (which has the one split `train`).
        split: which split.
        prompt_column: the column that holds the prompt; it is renamed to `prompt`.

    Returns:
        A table with the column `prompt` first, one row per prompt.

    Raises:
        PromptError: unknown name or split, unreadable file, missing column, empty pool, or a prompt that occurs twice.
    """
    if dataset_name in POOLS:
        rows = POOLS[dataset_name](split)
    elif dataset_name.endswith(".jsonl"):
        rows = _read_jsonl(Path(dataset_name), split)
    else:
        raise PromptError(
            f"unknown dataset {dataset_name!r}",
            cause="a misspelt name",
            way_out=f"use one of {', '.join(sorted(POOLS))}, or the path of a .jsonl file",
        )
    if not rows:
        raise PromptError(f"dataset {dataset_name!r} has no prompts in split {split!r}", way_out="add prompts")
    for number, row in enumerate(rows):
        if not isinstance(row.get(prompt_column), str) or not row[prompt_column]:
            raise PromptError(
                f"row {number} of {dataset_name!r} has no text in column {prompt_column!r}; it has {sorted(row)}",
                cause="the prompts are in another column",
                way_out="name it with batch_config.prompt_column",
            )
    prompts = [row[prompt_column] for row in rows]
    if len(set(prompts)) < len(prompts):
        twice = next(prompt for prompt, count in Counter(prompts).items() if count > 1)
        raise PromptError(
            f"{len(prompts) - len(set(prompts))} prompts of {dataset_name!r} occur twice, for example {twice!r}",
            way_out="remove the copies: the pool is a uniform law over distinct prompts",
        )
    others = [
        name for name in dict.fromkeys(key for row in rows for key in row) if name not in {prompt_column, "prompt"}
    ]
    try:
        return pa.table({"prompt": prompts} | {name: [row.get(name) for row in rows] for name in others})
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise PromptError(
            f"the columns of {dataset_name!r} cannot be made a table: {one_line(error)}",
            cause="one column holds values of two kinds, text and numbers say",
            way_out="give every column one kind of value",
        ) from None


def source_file(dataset_name: str) -> Path | None:
    """The file behind a pool; None for a pool that is code."""
    return None if dataset_name in POOLS else Path(dataset_name)


def _read_jsonl(path: Path, split: str) -> list[dict]:
    if split != "train":
        raise PromptError(f"{path} is one file and has no split {split!r}", way_out="set batch_config.split: train")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut texts at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}", way_out="give the path of a UTF-8 .jsonl file") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}:{number} is not JSON: {one_line(error)}", way_out="correct the line") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}:{number} is not a JSON object", way_out="write one object per line")
        rows.append(row)
    return rows
