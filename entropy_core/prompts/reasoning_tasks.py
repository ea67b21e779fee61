"""The tasks of reasoning-gym: problems that a program makes, and the scorer that comes with each of them.

A problem is the same for the same seed, size and options. What the scorer needs to know of it travels with the prompt,
in the column `entry`; it is never made a second time.
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
    """The library's name and version: problems may differ from one to the next.

    Raises:
        ConfigError: it is not installed.
    """
    _library()
    return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"


def problems(task: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The problems of a task.

    Args:
        task: its name in reasoning-gym, such as `chain_sum`.
        options: `size` and `seed` (512 and 42 where they are not given), and those of the task itself.

    Returns:
        One dictionary per problem: `prompt`, `answer` (null where many are right), and for the scorer `task` and
        `entry`, the problem as a Python literal. JSON would make lists of tuples, which some scorers compare.

    Raises:
        ConfigError: there is no such task, or it does not take these options.
        PromptError: it cannot make the problems.
    """
    return [dict(row) for row in _problems(json.dumps({"task": task, "options": DEFAULTS | dict(options)}))]


def score(completions: Sequence[str], task: Sequence[str], entry: Sequence[str], **_: Any) -> list[float]:
    """The reward: what the task's own scorer gives for the text in the last `<answer>…</answer>` of a response.

    Args:
        completions: the responses.
        task: of each problem, see `problems`.
        entry: of each problem, see `problems`.

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
            f"reasoning-gym does not make {asked['task']!r} with {asked['options']}: "
            f"{type(error).__name__}: {one_line(error)}",
            cause="an option that the task does not have, or a value out of its range",
            fix="correct batch_config.dataset_options",
        ) from error


def _plain(value: Any) -> Any:
    """A value without what has no literal form but equals one that has: enumerations, and NumPy's texts and numbers."""
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
                f"problem {number} of {recipe} cannot be made: {type(error).__name__}: {one_line(error)}",
                fix="use other options or another task",
            ) from error
        if unlike:
            raise PromptError(f"problem {number} of {recipe} cannot be written down", fix="use another task")
        answer = entry["answer"] if isinstance(entry["answer"], str) else None
        rows.append({"prompt": entry["question"], "answer": answer, "task": recipe, "entry": literal})
    return rows
