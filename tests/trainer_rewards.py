"""Rewards of every kind that a trainer takes; an untrained policy gets different amounts of each."""

import asyncio
from typing import Any


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def low_digits(completions: list, **_: Any) -> list[float]:
    return [sum(c in "01234" for c in _text(one)) / 4 for one in completions]


async def high_digits(completions: list, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [sum(c in "56789" for c in _text(one)) ** 2 / 8 for one in completions]


def only_some(completions: list, **_: Any) -> list[float | None]:
    """Leaves open whatever has a semicolon or begins with a 1."""
    return [None if ";" in _text(one) or _text(one)[:1] == "1" else len(_text(one)) / 8 for one in completions]


def of_messages(prompts: list, completions: list, **_: Any) -> list[float]:
    """What only conversations have."""
    for prompt, completion in zip(prompts, completions, strict=True):
        assert prompt[-1]["role"] in ("user", "assistant") and [m["role"] for m in completion] == ["assistant"]
    return [
        len(prompt) / 4 + ("+" in completion[0]["content"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def of_the_trainer(
    completions: list, completion_ids: list, trainer_state: Any, log_extra: Any, log_metric: Any, **_: Any
):
    log_extra("length", [len(ids) for ids in completion_ids])
    log_metric("step", float(trainer_state.global_step))
    return [len(ids) / 8 + 0.01 * trainer_state.global_step * (sum(ids) % 3) for ids in completion_ids]


def of_a_column(completions: list, level: list, **_: Any) -> list[float]:
    return [own * ("=" in _text(one)) for one, own in zip(completions, level, strict=True)]
