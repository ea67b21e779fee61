"""Prompt pools: where E and U draw their prompts from.

    arithmetic                              made by code
    reasoning_gym:TASK                      made by a library
    gsm8k, gsm8k_r1_template, math          datasets of the hub, from a local copy
    PATH.jsonl, PATH.parquet                files of the user

A pool is a table with a column `prompt`; its other columns (an answer, say) are passed on to the reward.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from entropy_core.errors import ConfigError, PromptError, one_line, some_names
from entropy_core.prompts import arithmetic, hub_datasets, reasoning_tasks
from entropy_core.prompts.files import SUFFIXES, holds, read_rows

KNOWN = ("arithmetic", *hub_datasets.DATASETS, f"{reasoning_tasks.PREFIX}TASK")


class Pool(NamedTuple):
    """Prompts, and what a reader of the results should know about them.

    Args:
        table: the column `prompt` first, one row per prompt.
        notes: sentences, without the full stop.
    """

    table: pa.Table
    notes: tuple[str, ...] = ()


def locate(dataset_name: str, dataset_path: str = "", allow_download: bool = False) -> Path | None:
    """The file or the folder behind a pool, by whose content results are keyed; None for a pool that is made.

    Args:
        dataset_name: see `load_pool`.
        dataset_path: of the local copy of a dataset of the hub, see `hub_datasets.locate`.
        allow_download: whether such a dataset may be fetched.

    Raises:
        PromptError: there is no local copy.
        ConfigError: a path is given for a pool that needs none.
    """
    if dataset_name in hub_datasets.DATASETS:
        return hub_datasets.locate(dataset_name, dataset_path, allow_download)
    if dataset_path:
        raise ConfigError(
            f"batch_config.dataset_path is given, and dataset {dataset_name!r} has no local copy to name",
            fix=f"leave it out, or use one of {', '.join(hub_datasets.DATASETS)}",
        )
    return Path(dataset_name).expanduser() if dataset_name.endswith(SUFFIXES) else None


def revision(path: Path) -> str:
    """Which commit of a repository of the hub a located folder holds; empty where that is not known."""
    return hub_datasets.revision(path)


def library(dataset_name: str) -> str:
    """The library that makes a pool, with its version; empty for one that no library makes."""
    return reasoning_tasks.version() if dataset_name.startswith(reasoning_tasks.PREFIX) else ""


def load_pool(
    dataset_name: str,
    split: str,
    prompt_column: str = "prompt",
    path: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Pool:
    """The prompts of one split.

    Args:
        dataset_name: one of `KNOWN`, or the path of a `.jsonl` or `.parquet` file. A file, and a task of reasoning-gym,
            has the one split `train`.
        split: which split.
        prompt_column: the column that holds the prompt; it is renamed to `prompt`.
        path: what `locate` found.
        options: of a task of reasoning-gym.

    Returns:
        The pool. Of prompts that a known dataset has twice the first counts, and a note says so.

    Raises:
        PromptError: unknown name or split, unreadable file, missing column, empty pool, or a prompt that a file of the
            user has twice.
        ConfigError: the options are not those of the task.
    """
    rows = _rows(dataset_name, split, path, dict(options or {}))
    if not rows:
        raise PromptError(f"dataset {dataset_name!r} has no prompts in split {split!r}", fix="add prompts")
    for number, row in enumerate(rows):
        if not isinstance(row.get(prompt_column), str) or not row[prompt_column]:
            conversation = isinstance(row.get(prompt_column), list)
            raise PromptError(
                f"row {number} of {dataset_name!r} has no text in column {prompt_column!r:.80}; it has "
                f"[{some_names(map(repr, sorted(row)))}]",
                cause="the prompts are conversations" if conversation else "the prompts are in another column",
                fix="give the text of the user's turn, and set batch_config.apply_chat_template"
                if conversation
                else "name it with batch_config.prompt_column",
            )
    notes: tuple[str, ...] = ()
    counts = Counter(row[prompt_column] for row in rows)
    if copies := len(rows) - len(counts):
        if dataset_name.endswith(SUFFIXES):
            twice = next(prompt for prompt, count in counts.items() if count > 1)
            raise PromptError(
                f"{copies} prompts of {dataset_name!r} occur twice, for example {twice!r:.80}",
                fix="remove the copies: the pool is a uniform law over distinct prompts",
            )
        notes = (f"{copies} of {len(rows)} prompts of {dataset_name} are copies and were left out",)
        first: dict[str, dict] = {}
        for row in rows:
            first.setdefault(row[prompt_column], row)
        rows = list(first.values())
    return Pool(_table(rows, dataset_name, prompt_column), notes)


def _rows(dataset_name: str, split: str, path: Path | None, options: dict[str, Any]) -> list[dict]:
    made = dataset_name.startswith(reasoning_tasks.PREFIX)
    if options and not made:
        raise ConfigError(
            f"batch_config.dataset_options are given, and dataset {dataset_name!r} has none",
            fix=f"leave them out, or use {reasoning_tasks.PREFIX}TASK",
        )
    if dataset_name == "arithmetic":
        return list(arithmetic.problems(split))
    if dataset_name in hub_datasets.DATASETS:
        return hub_datasets.rows(dataset_name, split, path or hub_datasets.locate(dataset_name, "", False))
    if not made and not dataset_name.endswith(SUFFIXES):
        raise PromptError(
            f"unknown dataset {dataset_name!r}",
            cause="a misspelt name",
            fix=f"use one of {', '.join(KNOWN)}, or the path of a .jsonl or .parquet file",
        )
    if split != "train":
        what = "is made by a program" if made else "is one file"
        raise PromptError(f"{dataset_name} {what} and has no split {split!r}", fix="set batch_config.split: train")
    if made:
        return reasoning_tasks.problems(dataset_name.removeprefix(reasoning_tasks.PREFIX), options)
    return read_rows(path or Path(dataset_name).expanduser())


def _table(rows: list[dict], dataset_name: str, prompt_column: str) -> pa.Table:
    names = [n for n in dict.fromkeys(key for row in rows for key in row) if n not in {prompt_column, "prompt"}]
    try:
        table = pa.table(
            {"prompt": [row[prompt_column] for row in rows]} | {name: [row.get(name) for row in rows] for name in names}
        )
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise PromptError(
            f"the columns of {dataset_name!r} cannot be made a table: {one_line(error)}",
            cause="one column holds values of two kinds, text and numbers say",
            fix="give every column one kind of value",
        ) from None
    empty = [field.name for field in table.schema if holds(field.type, _is_empty)]
    if empty:
        raise PromptError(
            f"columns of {dataset_name!r} have objects that are empty in every row: {some_names(map(repr, empty))}",
            fix="leave them out, or give each object a key",
        )
    return table


def _is_empty(column: pa.DataType) -> bool:
    """A struct of no fields, which no Parquet file can have."""
    return pa.types.is_struct(column) and column.num_fields == 0
