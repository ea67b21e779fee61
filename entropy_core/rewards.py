"""Reward functions, with TRL's signature: `f(prompts, completions, **columns) -> list[float]`."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from entropy_core import arithmetic
from entropy_core.errors import ConfigError, RewardError, one_line

RewardFunction = Callable[..., Sequence[float]]


def exact_match(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the whole response, stripped, equals the column `answer`; else 0."""
    return [float(c.strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


REWARDS: dict[str, RewardFunction] = {"arithmetic": arithmetic.exact_match, "exact_match": exact_match}


def load_reward(name: str) -> RewardFunction:
    """A reward function by its name in `REWARDS`, by `package.module:function`, or by `file.py:function`.

    Raises:
        ConfigError: there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, attribute = name.rpartition(":")
    known = f"use one of {', '.join(sorted(REWARDS))}, package.module:function, or file.py:function"
    if not colon:
        raise ConfigError(f"unknown reward {name!r}", cause="a misspelt name", way_out=known)
    try:
        function = getattr(_import(module_name), attribute)
    except (Exception, SystemExit) as error:  # user code may raise anything while it is imported
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"reward {name!r} cannot be imported ({reason})", way_out=known) from error
    if not callable(function):
        raise ConfigError(f"reward {name!r} is not a function", way_out=known)
    return function


def source_file(name: str) -> Path | None:
    """The file that a reward is looked up in; None for a built-in one, which is part of the code digest.

    Raises:
        ConfigError: there is no such function, or no such file.
    """
    if name in REWARDS:
        return None
    module_name = name.rpartition(":")[0]
    if Path(module_name).is_file():  # not imported, which may take long
        return Path(module_name)
    load_reward(name)
    file = getattr(sys.modules[module_name], "__file__", None)
    if not file or not file.endswith(".py"):
        raise ConfigError(
            f"reward {name!r} has no source file, so results cannot be keyed by its code",
            way_out="wrap it in a function of your own, in a .py file",
        )
    return Path(file)


def compute_rewards(
    name: str, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[float]:
    """One finite reward per response.

    Args:
        name: of the reward.
        prompts: text of each prompt.
        completions: text of each response.
        columns: further columns of the pool, one entry per response.

    Returns:
        As many rewards as responses.

    Raises:
        RewardError: it raised, returned another number of rewards, or one that is not a finite number.
    """
    function = load_reward(name)
    try:
        rewards = function(prompts=list(prompts), completions=list(completions), **columns)
    except (Exception, SystemExit) as error:  # user code may raise anything; nothing of it may turn into a reward
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RewardError(
            f"reward {name!r} raised {reason} on {len(completions)} response(s), beginning with {completions[0]!r:.80}",
            cause="a response that the function does not expect, or a column that the pool does not have",
            way_out=f"correct the function; the pool's columns are {sorted(columns)}",
        ) from error
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # arrays and tensors
    if not isinstance(rewards, Sequence) or len(rewards) != len(completions):
        got = f"{len(rewards)} values" if isinstance(rewards, Sequence) else type(rewards).__name__
        raise RewardError(f"reward {name!r} returned {got} for {len(completions)} responses", way_out="return a list")
    for i, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, Real) or not abs(reward) <= sys.float_info.max:
            raise RewardError(
                f"reward {name!r} returned {reward!r:.80} for sequence {i}, prompt {prompts[i]!r:.80}",
                way_out="return a finite float for every response",
            )
    return [float(reward) for reward in rewards]


def _import(module_name: str) -> Any:
    """The module as its file is now: results are keyed by that, so neither an older import nor bytecode will do."""
    if module_name.endswith(".py"):
        return _executed(f"user_reward_{Path(module_name).stem}", "", Path(module_name))
    module = importlib.import_module(module_name)
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py") or module_name.partition(".")[0] == __name__.partition(".")[0]:
        return module
    return _executed(module_name, module.__package__ or "", Path(file))


def _executed(name: str, package: str, file: Path) -> ModuleType:
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), package
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return module
