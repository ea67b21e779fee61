"""Tasks of reasoning-gym: generated problems, each with a scorer.

Equal seed, size and options give equal problems. The data that the scorer needs is stored with the prompt, in the
column `entry`, so problems are never generated again for scoring.
"""

import ast
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from types import ModuleType
from typing import Any

from entropy_core.errors import ConfigError, PromptError, one_line

PREFIX = "reasoning_gym:"
DEFAULTS = {"size": 512, "seed": 42}


def version() -> str:
    """Return the name and version of reasoning-gym, because problems may differ between versions.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    _library()
    return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"


def problems(task: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Generate the problems of a task.

    Args:
        task: name of the task in reasoning-gym, such as `chain_sum`.
        options: `size` (default 512), `seed` (default 42), and options of the task.

    Returns:
        One dictionary per problem: `prompt`, `answer` (None if several answers are right), and for the scorer `task`
        and `entry`, the problem as a Python literal. JSON would turn tuples into lists, and some scorers compare them.

    Raises:
        ConfigError: the task does not exist, or does not have these options.
        PromptError: the task cannot generate the problems.
    """
    return [dict(row) for row in _problems(json.dumps({"task": task, "options": DEFAULTS | dict(options)}))]


def score(completions: Sequence[str], task: Sequence[str], entry: Sequence[str], **_: Any) -> list[float]:
    """Score the content of the last `<answer>…</answer>` of each response with the scorer of its task.

    Args:
        completions: the responses.
        task: column `task` of each problem, from `problems`.
        entry: column `entry` of each problem, from `problems`.

    Returns:
        One reward per response.
    """
    from reasoning_gym.utils import extract_answer

    return [
        _dataset(its_task).score_answer(extract_answer(response), ast.literal_eval(its_entry))
        for response, its_task, its_entry in zip(completions, task, entry, strict=True)
    ]


def _library() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"reasoning-gym cannot be imported ({one_line(error)})",
            cause="entropy-probe was installed without its reasoning-gym extra",
            fix="pip install -e '.[reasoning-gym]'",
        ) from None
    return reasoning_gym


@lru_cache(maxsize=4)
def _dataset(recipe: str) -> Any:
    library, asked = _library(), json.loads(recipe)
    from reasoning_gym.factory import DATASETS

    if asked["task"] not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no task {asked['task']!r}", fix=f"use one of {', '.join(sorted(DATASETS))}"
        )
    try:
        return library.create_dataset(asked["task"], **asked["options"])
    except Exception as error:  # each task checks its options in its own way
        raise ConfigError(
            f"reasoning-gym cannot create {asked['task']!r} with {asked['options']}: "
            f"{type(error).__name__}: {one_line(error)}",
            cause="an option that the task does not have, or a value out of range",
            fix="correct batch_config.dataset_options",
        ) from error


def _plain(value: Any) -> Any:
    """Replace enumerations and NumPy strings and numbers by equal plain values, which have a literal form."""
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@lru_cache(maxsize=2)
def _problems(recipe: str) -> list[dict[str, Any]]:
    dataset, rows = _dataset(recipe), []
    for number in range(len(dataset)):
        try:
            entry = dataset[number]
            literal = repr(_plain(entry))
            unlike = ast.literal_eval(literal) != entry
        except Exception as error:
            raise PromptError(
                f"problem {number} of {recipe} cannot be generated: {type(error).__name__}: {one_line(error)}",
                fix="use other options or another task",
            ) from error
        if unlike:
            raise PromptError(f"problem {number} of {recipe} has no exact Python literal", fix="use another task")
        answer = entry["answer"] if isinstance(entry["answer"], str) else None
        rows.append({"prompt": entry["question"], "answer": answer, "task": recipe, "entry": literal})
    return rows
