"""One checkpoint of a trainer: its step, its parameters' names and shapes, and the optimizer's state by name.

No weight is loaded here: the model is built on the meta device, and of the safetensors files only headers are read.

An optimizer numbers its parameters in the order of its groups, not in that of `named_parameters()`. The names come from
the optimizer when it saved them; otherwise the groups are rebuilt as the Trainer builds them, and shapes must agree.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoint_files import SAVE_AGAIN, read_json, require_layout, stored_shapes
from entropy_core.errors import CheckpointError, ConfigError, one_line, some_names
from entropy_core.optimizer_state import (
    SAVE_NAMES,
    OptimizerState,
    SavedOptimizer,
    as_float,
    load_optimizer,
    optimizer_by_name,
)

# The patterns of Trainer.get_decay_parameter_names, whose module cannot be imported without accelerate.
NO_DECAY_PATTERNS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint directory says, its weights aside.

    Attributes:
        directory: where it is.
        name: the directory's own name, such as `checkpoint-100`.
        step: the trainer's `global_step`.
        optimizer: Adam's state by name; its tensors are read from `optimizer.pt` when they are first used.
        parameter_shapes: every trainable parameter, in `named_parameters()` order (a tied weight once).
        assumptions: what the files do not say and was taken to be so, one sentence each.
    """

    directory: Path
    name: str
    step: int
    optimizer: OptimizerState
    parameter_shapes: dict[str, tuple[int, ...]]
    assumptions: tuple[str, ...]


def read_checkpoint(directory: Path, learning_rate: float | None = None) -> Checkpoint:
    """Read the optimizer's state by name, and verify that it belongs to the model and can make a next step.

    Args:
        directory: a checkpoint directory of full fine-tuning.
        learning_rate: takes the place of the largest saved one; groups keep their ratios. None keeps the saved ones.

    Returns:
        The checkpoint; the tensors are on the CPU and map `optimizer.pt` privately.

    Raises:
        CheckpointError: a file is missing, corrupt, or a pickle with code; the weights do not fit the config; the
            optimizer is not Adam or AdamW, lacks hyperparameters, does not cover every trainable parameter, or has
            slots that are left over, of a wrong shape, not finite, or before their first step; every saved learning
            rate is 0 and none is given.
        ConfigError: `learning_rate` is not a positive finite number.
    """
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate is {learning_rate}", way_out="give a positive number, or leave it out")
    directory = Path(directory)
    require_layout(directory)
    global_step = _global_step(directory)
    model = _architecture(directory)
    renamed = _check_weights(directory, model)
    saved = load_optimizer(directory / "optimizer.pt")
    names, guessed = _group_names(saved, model)
    optimizer, assumed = optimizer_by_name(saved, names, model.shapes, learning_rate)
    assumptions = (*renamed, *guessed, *assumed)
    low, high = min(optimizer.step.values()), max(optimizer.step.values())
    if not low == high == global_step:
        taken = str(low) if low == high else f"{low} to {high}"
        assumptions += (
            f"The optimizer counts {taken} steps, the trainer {global_step}: bias correction uses the optimizer's.",
        )
    return Checkpoint(
        directory=directory,
        name=directory.resolve().name,
        step=global_step,
        optimizer=optimizer,
        parameter_shapes=model.shapes,
        assumptions=assumptions,
    )


def _global_step(directory: Path) -> int:
    step = read_json(directory / "trainer_state.json").get("global_step")
    if not isinstance(step, int) or step <= 0:
        raise CheckpointError(
            f"{directory}/trainer_state.json has global_step {step!r}",
            cause="saved before the first step",
            way_out="probe a later checkpoint",
        )
    return step


class _Architecture(NamedTuple):
    shapes: dict[str, tuple[int, ...]]  # in named_parameters() order, a tied weight once
    first_name: dict[str, str]  # every name of a parameter → the one in `shapes`
    buffers: set[str]
    decay: tuple[str, ...]  # the Trainer's first group
    no_decay: tuple[str, ...]  # and its second
    saved_by: str | None  # transformers version
    read_by: str


def _architecture(directory: Path) -> _Architecture:
    """The model that config.json describes, on the meta device: names and shapes without storage."""
    import transformers
    from transformers.trainer_pt_utils import get_parameter_names

    read_json(directory / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            # An explicit dtype leaves torch's process-wide default alone.
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.get_default_dtype(), trust_remote_code=False
            )
    except Exception as error:
        raise CheckpointError(
            f"{directory}/config.json does not describe a causal language model of transformers "
            f"{transformers.__version__}: {one_line(error)}",
            cause="a newer or a custom architecture",
            way_out="install the version of transformers that trained it; custom code is not run",
        ) from error
    first = {id(p): name for name, p in model.named_parameters()}
    decays = set(get_parameter_names(model, [torch.nn.LayerNorm], list(NO_DECAY_PATTERNS)))
    return _Architecture(
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        first_name={name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)},
        buffers={name for name, _ in model.named_buffers()},
        decay=tuple(name for name in first.values() if name in decays),
        no_decay=tuple(name for name in first.values() if name not in decays),
        saved_by=getattr(config, "transformers_version", None),
        read_by=transformers.__version__,
    )


def _check_weights(directory: Path, model: _Architecture) -> tuple[str, ...]:
    """Every parameter is in the files with its shape; what transformers renames on loading must at least add up."""
    stored = stored_shapes(directory)
    if wrong := [
        f"{name} {stored[name]} (config: {model.shapes[first]})"
        for name, first in model.first_name.items()
        if name in stored and stored[name] != model.shapes[first]
    ]:
        raise CheckpointError(
            f"{directory}: the weights have other shapes than config.json says: {some_names(wrong)}",
            cause="config.json and weights of two different models",
            way_out=SAVE_AGAIN,
        )
    present = {first for name, first in model.first_name.items() if name in stored}
    missing = [name for name in model.shapes if name not in present]
    if not missing:
        return ()
    renamed = [shape for name, shape in stored.items() if name not in model.first_name and name not in model.buffers]
    if sum(map(math.prod, renamed)) < sum(math.prod(model.shapes[name]) for name in missing):
        raise CheckpointError(
            f"{directory}: no weights for {some_names(missing)}",
            cause="an incomplete save, or config.json of another model",
            way_out=SAVE_AGAIN,
        )
    return (f"The files store {len(missing)} parameters under other names, for transformers to convert.",)


def _group_names(saved: SavedOptimizer, model: _Architecture) -> tuple[list[tuple[str, ...]], list[str]]:
    """The parameter names of every group, parallel to its `params`; and what had to be assumed."""
    path, slots, groups = saved
    sizes = [len(group["params"]) for group in groups]
    written = [group.get("param_names") or () for group in groups]
    if [len(names) for names in written] == sizes:
        return [tuple(_model_name(model, str(name)) for name in names) for names in written], []
    if len(groups) == 1:
        expected = [tuple(model.shapes)]
        how = "one param group, taken to be model.parameters() in order"
    elif len(groups) == 2:
        expected = [model.decay, model.no_decay]
        how = "two param groups, taken to be the Trainer's: with weight decay, then without"
    else:
        raise CheckpointError(
            f"{path} has {len(groups)} param groups and no parameter names",
            cause="a custom create_optimizer",
            way_out="build the optimizer from named parameters (torch 2.6 or newer saves the names) and save again",
        )
    if sizes != [len(names) for names in expected]:
        moments = [slot.get("exp_avg") for slot in slots.values()]
        lacking = Counter(model.shapes.values()) - Counter(tuple(m.shape) for m in moments if isinstance(m, Tensor))
        among = [name for name, shape in model.shapes.items() if shape in lacking]
        raise CheckpointError(
            f"{path} lists {' + '.join(map(str, sizes))} parameters, the model has "
            f"{' + '.join(str(len(names)) for names in expected)}"
            + (f"; by shape, {lacking.total()} missing among {some_names(among)}" if among else ""),
            cause="frozen parameters, or a custom create_optimizer",
            way_out=f"train all parameters, or {SAVE_NAMES}",
        )
    if len(groups) == 2 and groups[1]["params"] and as_float(groups[1]["weight_decay"]) != 0:
        fact = f"{path} decays its second param group too, so that the groups are not the Trainer's"
        raise CheckpointError(fact, cause="a custom create_optimizer", way_out=SAVE_NAMES)
    said = [f"optimizer.pt has no parameter names: {how}."]
    if model.saved_by and model.saved_by.split(".")[:2] != model.read_by.split(".")[:2]:
        by = model.read_by
        said.append(f"Saved with transformers {model.saved_by}; parameter order and groups are those of {by}.")
    return expected, said


def _model_name(model: _Architecture, name: str) -> str:
    """The model's name for a saved one: without the prefixes of wrappers, and tied weights under their first name."""
    bare = name
    while bare not in model.first_name and bare.startswith(WRAPPER_PREFIXES):
        bare = bare.split(".", 1)[1]
    return model.first_name.get(bare, name)
