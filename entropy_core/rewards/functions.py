"""Reward functions, with TRL's signature `f(prompts, completions, **columns) -> list[float]`, verl's or OpenRLHF's.

    exact_match              the whole response is the column `answer`
    arithmetic, gsm8k        the final answer of the demo's task, the number after `####`
    boxed, answer_tag        what is in \\boxed{…} or <answer>…</answer>, compared by math-verify
    reasoning_gym            the scorer of the task
    PATH.py:function, package.module:function        of the user

A function of the user runs in a process of its own, within limits, see `isolation`; one of this package where it is
called.

Prompts are as the pool has them, and completions are like them: text where prompts are text, whether a chat template
was applied or not; and messages where they are conversations. A response's special tokens are left out.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from entropy_core.errors import ProbeError, RewardError, one_line, some_names
from entropy_core.files import functions as user_functions
from entropy_core.isolation.process import Isolation
from entropy_core.prompts import arithmetic, reasoning_tasks
from entropy_core.prompts.conversations import as_messages
from entropy_core.rewards import math_answers
from entropy_core.rewards.signatures import Responses, call

LARGEST = 1e30
"""A larger reward makes a gradient that no float32 holds."""

RewardFunction = Callable[..., Sequence[float]]

_DEFAULT_LIMITS = Isolation()


def exact_match(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the whole response, stripped, equals the column `answer`; else 0."""
    return [float(c.strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


REWARDS: dict[str, RewardFunction] = {
    "answer_tag": math_answers.answer_tag,
    "arithmetic": arithmetic.exact_match,
    "boxed": math_answers.boxed,
    "exact_match": exact_match,
    "gsm8k": math_answers.gsm8k,
    "reasoning_gym": reasoning_tasks.score,
}


def load_reward(name: str) -> RewardFunction:
    """A reward function by its name in `REWARDS`, by `package.module:function`, or by `file.py:function`.

    Raises:
        ConfigError: there is no such function.
    """
    return user_functions.load("reward", name, REWARDS)


def source_file(name: str) -> Path | None:
    """The file that a reward is looked up in; None for a built-in one, which is part of the code digest.

    Raises:
        ConfigError: there is no such function, or no such file.
    """
    return user_functions.source_file("reward", name, REWARDS)


def library(name: str) -> str:
    """The library that a reward leaves the decision to, with its version; empty where there is none."""
    if name in {"answer_tag", "boxed"}:
        return math_answers.version()
    return reasoning_tasks.version() if name == "reasoning_gym" else user_functions.release_of(name, REWARDS)


def imported_files(name: str) -> dict[str, Path]:
    """The modules beside a user's file that it imports, by their paths relative to it; see `files.functions`."""
    file = source_file(name)
    return user_functions.imported_files(file) if file else {}


def compute_rewards(
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    isolation: Isolation = _DEFAULT_LIMITS,
    *,
    token_ids: Sequence[Sequence[int]] = (),
    trainer_state: Mapping[str, Any] | None = None,
) -> list[float | None]:
    """The reward of each response by one function, a finite number; None where the function leaves it open.

    Args:
        name: of the reward.
        prompts: text of each prompt, or its conversation.
        completions: text of each response.
        columns: further columns of the pool, one entry per response.
        isolation: how a function of the user is called.
        token_ids: of each response.
        trainer_state: what the trainer saved of its state.

    Returns:
        As many rewards as responses.

    Raises:
        RewardError: it raised, returned another number of rewards, or one that is not a finite number; names the
            sequence. True and False are 1 and 0. Or it passed a limit, or ended its process.
        ConfigError: there is no such function.
    """
    texts = list(completions)
    turns = as_messages(texts) if any(isinstance(prompt, list) for prompt in prompts) else texts
    ids = [list(row) for row in token_ids] or [[] for _ in texts]
    responses = Responses(list(prompts), texts, turns, ids, dict(columns), dict(trainer_state or {}))
    if name in REWARDS:
        return _called(name, responses._replace(completions=texts))
    answer = isolation.call(
        _called_apart,
        *(name, responses),
        whose=f"reward {name!r}",
        file=str(source_file(name)),
        error=RewardError,
        largest=2**16 + 32 * len(completions),
    )
    return _checked(name, answer, len(completions))


def _called_apart(name: str, responses: Responses) -> bytes:
    """What the process of a user's function answers."""
    return json.dumps(_called(name, responses)).encode()


def _checked(name: str, answer: bytes, count: int) -> list[float | None]:
    """What it has answered, which may be anything."""
    rewards: Any = None
    with suppress(ValueError, RecursionError):
        rewards = json.loads(answer)
    as_promised = isinstance(rewards, list) and len(rewards) == count
    if not as_promised or not all(r is None or (type(r) is float and math.isfinite(r)) for r in rewards):
        raise RewardError(
            f"what reward {name!r} returned did not arrive as {count} finite numbers",
            cause="it returns objects that are numbers only by name, or changes Python's own functions",
            fix="return a list of floats",
        )
    return rewards


def _called(name: str, responses: Responses) -> list[float | None]:
    """Call it here, and make sure of what it returns."""
    function, file = load_reward(name), source_file(name)
    prompts, texts, columns = responses.prompts, responses.texts, responses.columns

    def attempt(first: int, stop: int) -> Any:
        return call(function, responses.part(first, stop))

    rewards: Any
    try:
        rewards = attempt(0, len(texts))
    except ProbeError as error:
        raise type(error)(f"reward {name!r}: {error.fact}", cause=error.cause, fix=error.fix) from None
    except (Exception, SystemExit) as error:  # user code may raise anything; nothing of it may turn into a reward
        i = _culprit(attempt, len(texts))
        line = user_functions.line_of(error, file) if file else ""
        whose = "" if i is None else f"sequence {i}, prompt {prompts[i]!r:.80}, response {texts[i]!r:.80}"
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {one_line(error)}{line and f' at {line}'} on "
            f"{whose or f'{len(texts)} responses together, and not on either half of them'}",
            cause=_cause(responses),
            fix=f"correct the function; the pool's columns are [{some_names(map(repr, sorted(columns)))}]",
        ) from error
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # arrays and tensors
    if not isinstance(rewards, Sequence) or len(rewards) != len(texts):
        got = f"{len(rewards)} values" if isinstance(rewards, Sequence) else type(rewards).__name__
        raise RewardError(f"reward {name!r} returned {got} for {len(texts)} responses", fix="return a list")
    rewards = [reward.item() if getattr(reward, "ndim", None) == 0 else reward for reward in rewards]
    for i, reward in enumerate(rewards):
        if reward is not None and (not isinstance(reward, Real) or not abs(reward) <= LARGEST):  # type: ignore[operator]
            raise RewardError(
                f"reward {name!r} returned {reward!r:.80} for sequence {i}, prompt {prompts[i]!r:.80}",
                cause="it leaves the response open, which TRL says with None"
                if isinstance(reward, float) and math.isnan(reward)
                else "",
                fix=f"return a finite float for every response, of at most {LARGEST:g} in size, or None",
            )
    return [None if reward is None else float(reward) for reward in rewards]


def _cause(responses: Responses) -> str:
    """What made a function raise, as a rule."""
    if any(isinstance(prompt, list) for prompt in responses.prompts):
        return (
            "the prompts are conversations, so that completions are lists of messages; or a response or a column "
            "that the function does not expect"
        )
    return "a response that the function does not expect, or a column that the pool does not have"


def _culprit(call: Callable[[int, int], Any], count: int) -> int | None:
    """A sequence on which the function raises by itself, found by halving; None where it raises on neither half."""

    def raises(first: int, stop: int) -> bool:
        try:
            call(first, stop)
        except (Exception, SystemExit):
            return True
        return False

    first, stop = 0, count
    while stop - first > 1:
        middle = (first + stop) // 2
        if raises(first, middle):
            stop = middle
        elif raises(middle, stop):
            first = middle
        else:
            return None
    return first
