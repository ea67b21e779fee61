"""The learning rates of the steps after a checkpoint, as transformers' Trainer would have them.

`scheduler.pt` says where the schedule was, and not what it is: that is in the trainer's settings. transformers makes
the schedule of them anew, and it is believed if it gives the learning rates that the file has.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.inert_pickle import plain, read_pickle
from entropy_core.checkpoints.training_args import DAMAGED, TRAINING_ARGUMENTS, pickle_in

SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"


class UnknownScheduleError(ValueError):
    """The learning rates to come cannot be told; the message says why, to follow a colon."""


def factors_to_come(directory: Path, arguments: Mapping[str, Any], steps: int) -> tuple[float, ...]:
    """Return the learning rates of the next steps over that of the first of them. Executes nothing of `scheduler.pt`.

    Args:
        directory: of the checkpoint.
        arguments: the trainer's settings.
        steps: how many steps there are.

    Returns:
        One factor for each step; the first is 1. Steps after the end of the run have that of its last step.

    Raises:
        UnknownScheduleError: the files do not say the schedule, it depends on what the steps will bring, or it does not
            give the learning rates that were saved.
    """
    if "lr_scheduler_type" not in arguments:
        raise UnknownScheduleError(f"no {TRAINING_ARGUMENTS} says it")
    name = str(arguments["lr_scheduler_type"]).rpartition(".")[2].lower()
    if name == "constant":
        return (1.0,) * steps
    base_lrs, last_lrs, made = _saved(directory / SCHEDULER)
    state = read_json(directory / TRAINER_STATE) if (directory / TRAINER_STATE).is_file() else {}
    total = state.get("max_steps")
    if not isinstance(total, int) or total < 1 or state.get("global_step") != made:
        raise UnknownScheduleError(f"{TRAINER_STATE} and {SCHEDULER} do not say the same step, or of how many it is")
    multiplier = _multiplier(name, arguments, total)
    now = multiplier(made)
    if not all(math.isclose(base * now, last, rel_tol=1e-9) for base, last in zip(base_lrs, last_lrs, strict=True)):
        raise UnknownScheduleError(f"{name} with these settings does not give the learning rates in {SCHEDULER}")
    if not now > 0:
        raise UnknownScheduleError(f"the schedule ({name}) had ended")
    last = max(total - 1, made)
    return tuple(multiplier(min(made + step, last)) / now for step in range(steps))


def _saved(path: Path) -> tuple[list[float], list[float], int]:
    """The learning rates at the start of the schedule and now, of each parameter group, and how often it moved on."""
    try:
        state = plain(read_pickle(pickle_in(path)))
        found = [[float(rate) for rate in state[key]] for key in ("base_lrs", "_last_lr")]
        made = state["last_epoch"]
        if not isinstance(made, int) or len(found[0]) != len(found[1]):
            raise ValueError
    except (*DAMAGED, KeyError, TypeError, ValueError):
        raise UnknownScheduleError(f"{SCHEDULER} is missing, or is of another scheduler") from None
    return found[0], found[1], made


def _multiplier(name: str, arguments: Mapping[str, Any], total: int) -> Any:
    """The learning rate over that at the start, as a function of the number of steps."""
    from transformers import get_scheduler

    kwargs = arguments.get("lr_scheduler_kwargs") or {}
    try:
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else dict(kwargs)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=float(arguments["learning_rate"]))
        made = get_scheduler(name, optimizer, _warmup(arguments, total), total, kwargs)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UnknownScheduleError(f"transformers cannot make a schedule {name} of the trainer's settings") from None
    if not isinstance(made, torch.optim.lr_scheduler.LambdaLR):
        raise UnknownScheduleError(f"{name} depends on what the steps bring")
    return made.lr_lambdas[0]


def _warmup(arguments: Mapping[str, Any], total: int) -> int:
    """Steps of the warm-up, as releases of transformers have counted them; below 1 it is a share of all steps."""
    steps = float(arguments.get("warmup_steps") or 0)
    share = float(arguments.get("warmup_ratio") or 0) if steps == 0 else steps
    return int(steps) if steps >= 1 else math.ceil(total * share)
