"""One checkpoint of a trainer: its step, its parameters' names and shapes, and the optimizer's state by name.

No weight is loaded here: of the safetensors files only headers are read.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from entropy_core.checkpoints.architecture import Architecture, Shapes, read_architecture
from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.layout import Layout, find_layout, has_second_copy
from entropy_core.checkpoints.layouts.interface import understood
from entropy_core.checkpoints.layouts.places import find_places, open_state
from entropy_core.checkpoints.optimizer_file import LATEST, load_optimizer
from entropy_core.checkpoints.optimizer_names import name_slots
from entropy_core.checkpoints.optimizer_settings import as_float
from entropy_core.checkpoints.optimizer_state import OptimizerState, fresh_optimizer, optimizer_by_name
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.files.checkpoint import checkpoint_name, step_in_name
from entropy_core.numerics.rules import RULES

log = logging.getLogger("entropy_probe.checkpoints")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint directory says, its weights aside.

    Attributes:
        layout: where its parts lie.
        name: the directory's own name, such as `checkpoint-100`.
        step: the trainer's `global_step`; 0 for a fresh model that says none.
        optimizer: the optimizer's state by name; its tensors are read from `optimizer.pt` when they are used.
        parameter_shapes: every trained parameter, in `named_parameters()` order (a tied weight once).
        model_shapes: every parameter of the model without its adapter.
        narrow: dtype of the parameters that the trainer keeps in one narrower than float32, as torch names it.
        assumptions: what the files do not say and was taken to be so, one sentence each.
    """

    layout: Layout
    name: str
    step: int
    optimizer: OptimizerState
    parameter_shapes: Shapes
    model_shapes: Shapes
    narrow: dict[str, str]
    assumptions: tuple[str, ...]


def read_checkpoint(
    directory: Path,
    learning_rate: float | None = None,
    base_model: Path | str = "",
    fresh: bool = False,
    masters: bool = False,
) -> Checkpoint:
    """Read the optimizer's state by name, and verify that it belongs to the model and can make a next step.

    Nothing of the size of the model is read; whether the moments are numbers, `optimizer_state.check_moments` says.

    Args:
        directory: a checkpoint directory; `checkpoints.layout` says which files it may have.
        learning_rate: takes the place of the largest saved one; groups keep their ratios. None keeps the saved ones.
        base_model: takes the place of the base that an adapter names.
        fresh: the optimizer has made no step: moments of 0, the Trainer's default hyperparameters, and the learning
            rate, which must be given.
        masters: the weights are those of the shards, even where there are others that transformers can open.

    Returns:
        The checkpoint; the tensors are on the CPU and map `optimizer.pt` privately.

    Raises:
        CheckpointError: a file is missing, corrupt, or a pickle with code; the weights do not fit the config; the
            optimizer's step is not known, it lacks hyperparameters, does not cover every trained parameter, or has
            slots that are left over, of a wrong shape, or before their first step; every saved learning rate is 0,
            none is given and none was logged.
        ConfigError: `learning_rate` is not a positive finite number, or is missing where the optimizer is fresh.
    """
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate is {learning_rate}", fix="give a positive number, or leave it out")
    if fresh and learning_rate is None:
        fact = "the optimizer is fresh, and has no learning rate of its own"
        raise ConfigError(fact, fix="set `learning_rate` to that of the run")
    layout = find_layout(directory, base_model, fresh, masters)
    global_step, rate = _progress(layout)
    model, said = read_architecture(layout)
    if layout.optimizer is None:
        assert learning_rate is not None
        optimizer, assumed = fresh_optimizer(model.trained, learning_rate)
    else:
        optimizer, assumed = _saved_optimizer(layout, model, learning_rate, rate)
        counts = [steps for steps in optimizer.step.values() if steps] or [global_step or 0]
        low, high = min(counts), max(counts)
        if global_step is None:
            global_step = high
            assumed += (f"No file and no folder's name says the trainer's step: it is the optimizer's, {high}.",)
        if not low == high == global_step:
            taken = str(low) if low == high else f"{low} to {high}"
            assumed += (
                f"The optimizer counts {taken} steps, the trainer {global_step}: bias correction uses the optimizer's.",
            )
    if layout.base is None and layout.shards is None and layout.optimizer and (other := other_copy(layout)):
        assumed += (other,)
    matched, trained = len(optimizer.step), len(model.trained)
    log.info("%s: optimizer state matched by name for %d of %d trained parameters", directory, matched, trained)
    narrow = _narrow(model, optimizer)
    if narrow:
        assumed += (
            f"The trainer keeps {len(narrow)} of {matched} parameters and their moments in "
            f"{' and '.join(sorted(set(narrow.values())))}, and rounds its step: so does the step here, δH₁ is its "
            "first order along the weights' real change, and other step sizes are multiples of that change, not "
            "rounded anew. The part of δH₁ that rounding adds is listed; intervals over U are of the step before it.",
        )
    return Checkpoint(
        layout=layout,
        name=checkpoint_name(layout.directory),
        step=global_step or 0,
        optimizer=optimizer,
        parameter_shapes=model.trained,
        model_shapes=model.of_model,
        narrow=narrow,
        assumptions=(*said, *assumed),
    )


_SAVED_AS = {torch.bfloat16: "BF16", torch.float16: "F16"}


def _narrow(model: Architecture, optimizer: OptimizerState) -> dict[str, str]:
    """The parameters that the trainer keeps in a narrow dtype: torch's Adam has its moments in that of its weights.

    Wide weights beside narrow moments are of an optimizer that rounds the moments alone, and narrow weights beside wide
    moments of a trainer that narrows what it saves. Where the moments say nothing, narrow weights are taken to be so in
    the trainer. Raises CheckpointError where it is not known how the optimizer rounds its step.
    """
    if not optimizer.slot:
        return {}
    found = {}
    for group in optimizer.groups:
        first = optimizer.moments[group.moments[0]] if group.moments else {}
        for name in group.names:
            dtype = first[name].dtype if name in first else torch.float32
            saved_as = _SAVED_AS.get(dtype)
            if saved_as and model.saved_as.get(name, saved_as) == saved_as:
                found[name] = str(dtype).removeprefix("torch.")
            unsaid = not group.moments_tell and model.saved_as.get(name) in _SAVED_AS.values()
            if unsaid or (name in found and group.rule != "adamw"):
                of = "bitsandbytes' " if group.moments and unsaid and group.rule != "adafactor" else ""
                raise CheckpointError(
                    f"the weight {name} is kept in {found.get(name) or model.saved_as[name]}, and how "
                    f"{of}{RULES[group.rule].name} rounds its step there is not known",
                    fix="train with float32 weights (bf16=True keeps them so), or with torch's AdamW",
                )
    return found


def other_copy(layout: Layout) -> str:
    """What is to be said where the trainer keeps weights in shards beside those that transformers opens."""
    places = find_places(layout.directory)
    if places is None or not has_second_copy(places):
        return ""
    return (
        f"The weights are those that {places.trainer} saved to be opened, and not the copy in its shards: "
        "`policy.weights: master` takes that one."
    )


class LoggedRate(NamedTuple):
    """A learning rate that the trainer logged; 0 where there is none."""

    value: float
    source: str


def _saved_optimizer(
    layout: Layout, model: Architecture, learning_rate: float | None, rate: LoggedRate
) -> tuple[OptimizerState, tuple[str, ...]]:
    assert layout.optimizer is not None
    saved, names, guessed = name_slots(load_optimizer(layout.optimizer), model, layout)
    if learning_rate is None and rate.value and all(as_float(group["lr"]) == 0 for group in saved.groups):
        learning_rate = rate.value
        guessed.append(f"The saved learning rate is 0; the step has {rate.value:g}, {rate.source}.")
    optimizer, assumed = optimizer_by_name(saved, names, model.trained, learning_rate)
    return optimizer, (*guessed, *assumed)


def _progress(layout: Layout) -> tuple[int | None, LoggedRate]:
    """The trainer's step, and the last learning rate above 0 up to then; None where nothing says the step."""
    if layout.progress is None:
        step = step_in_name(layout.directory)
        if step is None and layout.optimizer is not None:
            with understood(layout.optimizer):
                step = open_state(layout.optimizer).step()
        return step, LoggedRate(0.0, "")
    content = read_json(layout.progress)
    step = content.get("global_step", content.get("step"))
    if (
        isinstance(step, bool)
        or not isinstance(step, int)
        or not (0 if layout.optimizer is None else 1) <= step < LATEST
    ):
        raise CheckpointError(
            f"{layout.progress} has global_step {step!r}",
            cause="saved before the first step",
            fix="probe a later checkpoint",
        )
    log = content.get("log_history")
    for entry in reversed(log if isinstance(log, list) else []):
        if isinstance(entry, dict) and 0 < as_float(entry.get("learning_rate")) < math.inf:
            source = f"that of step {entry.get('step')} in {layout.progress.name}"
            return step, LoggedRate(as_float(entry["learning_rate"]), source)
    rate = as_float(content.get("learning_rate"))
    return step, LoggedRate(rate if 0 < rate < math.inf else 0.0, f"that of {layout.progress.name}")
