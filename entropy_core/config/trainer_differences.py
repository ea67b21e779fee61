"""What a trainer does that is not modelled, as the files of a checkpoint say it."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from entropy_core.checkpoints.inert_pickle import Inert
from entropy_core.checkpoints.model_config import GENERATION
from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.checkpoints.training_args import TRAINING_ARGUMENTS
from entropy_core.config.trainer_fields import GENERATION as LEFT_OPEN
from entropy_core.config.trainer_fields import MODELLED_AT, NO_EFFECT, OF_ROLLOUTS, OPTIMIZER, SETTINGS


class Difference(NamedTuple):
    """What the trainer does and the step here does not.

    Attributes:
        name: of the trainer's setting.
        sentence: what is so, without the full stop.
        weight: see `trainer_fields.Rule`.
        key: of ours, whose value by the user says that this is known; empty where there is none.
    """

    name: str
    sentence: str
    weight: Literal["refuse", "warn", "note"]
    key: str = ""


KNOWN = {*SETTINGS, *OPTIMIZER, *NO_EFFECT, *MODELLED_AT}
TOOLS = "tools"
LEFT_OUT = {*SETTINGS, *MODELLED_AT, *LEFT_OPEN, TOOLS}
"""What `update.leave_out` may name."""


def differences(files: TrainerFiles, follows: bool) -> Iterator[Difference]:
    """Say what the settings of a trainer do that is not modelled.

    Args:
        files: of one checkpoint.
        follows: whether all steps on a rollout are taken, and not the first alone.

    Yields:
        The differences.
    """
    arguments = files.arguments
    if files.kind in ("GRPO", "RLOO"):
        for name, rule in MODELLED_AT.items():
            if follows and name in OF_ROLLOUTS:
                continue  # these steps are all taken
            value = arguments.get(name)
            if name == "router_aux_loss_coef" and files.has_experts and value is None:
                what = "the model has experts, and the loss may have had a term that balances their load"
                yield Difference(name, what, "warn")
            elif name in arguments and (isinstance(value, Inert) or not _same(rule.same, value, arguments)):
                what, weight = rule.what, rule.weight
                if name in OF_ROLLOUTS and (place := place_in_rollout(files)):
                    number, of = place
                    what += f"; the next one is number {number} of the {of} on its rollout"
                    if (name, number) == ("num_iterations", 1):  # of the other name's steps each has part of a group
                        weight = "note"
                yield Difference(name, f"the trainer had {name} = {shown(value)}: {what}", weight, rule.key)
        if not arguments.get("use_vllm"):
            for name, same in LEFT_OPEN.items():
                value = files.generation.get(name)
                if arguments.get(name) is None and not _same(same, value, arguments):
                    what = f"{GENERATION} has {name} = {shown(value)}, which the trainer's sampling obeys, too"
                    yield Difference(name, what, "refuse")
        unknown = sorted(name for name in arguments if name not in KNOWN and not name.startswith("_"))
        if unknown:
            yield Difference("", f"settings of the trainer that are not known here: {', '.join(unknown)}", "warn")
        if any(entry.get("tools/call_frequency") for entry in files.log):
            what = "the trainer logged calls of tools: responses of several turns, with what the tools said, are not "
            yield Difference(TOOLS, f"{what}modelled", "refuse")
    elif files.kind:
        what = f"{TRAINING_ARGUMENTS} is of {files.kind}: of its settings only max_grad_norm is read"
        yield Difference("", what, "warn")
    if files.drops:
        rates = ", ".join(f"{name} = {rate:g}" for name, rate in files.dropout.items())
        yield Difference("", f"dropout was on in the trainer's step as a rule ({rates}), and is off here", "warn")
    if files.quantised_base:
        what = f"the adapter was trained on {files.quantised_base!r}, which is quantised, and the base here is not"
        yield Difference("", what, "warn")


def place_in_rollout(files: TrainerFiles) -> tuple[int, int] | None:
    """Tell which of the steps on its rollout the next step is, from 1, and how many there are; None if not known.

    TRL counts from the start of its process: it begins a rollout anew where it resumes.
    """
    accumulated, iterations, parts = (
        files.arguments.get(name) for name in ("gradient_accumulation_steps", "num_iterations", "steps_per_generation")
    )
    parts = accumulated if parts is None else parts
    if not (isinstance(accumulated, int) and isinstance(iterations, int) and isinstance(parts, int)):
        return None
    if files.step is None or accumulated < 1 or parts * iterations % accumulated:
        return None
    steps = parts * iterations // accumulated
    return (files.step % steps + 1, steps) if steps > 1 else None


def _same(same: Any, value: Any, arguments: Mapping[str, Any]) -> bool:
    try:
        return bool(same(value, arguments))
    except TypeError:  # a value of another type than the trainer's own
        return False


def shown(value: Any) -> str:
    """A value of the trainer's, on one line; an inert stand-in by its name."""
    return value.name if isinstance(value, Inert) else reprlib.repr(value)
