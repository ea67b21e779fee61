"""Whose slot is whose: the parameter names of an optimizer's groups.

An optimizer numbers its parameters in the order of its groups, not in that of `named_parameters()`. The names come from
the optimizer when it saved them, else from a file beside it; otherwise the groups are rebuilt as the Trainer builds
them, or PEFT's LoRA+, and shapes must agree.
"""

from collections import Counter
from itertools import islice
from typing import Any

from entropy_core.checkpoints.architecture import Architecture
from entropy_core.checkpoints.content import read_names
from entropy_core.checkpoints.layout import Layout
from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.optimizer_file import SAVE_NAMES
from entropy_core.checkpoints.optimizer_settings import as_float
from entropy_core.checkpoints.partly_trained import only_choice, unchanged_weights
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN

GroupNames = list[tuple[str, ...]]


def name_slots(
    saved: SavedOptimizer, model: Architecture, layout: Layout
) -> tuple[SavedOptimizer, GroupNames, list[str]]:
    """Find the parameter names of every group.

    Args:
        saved: what `optimizer.pt` holds.
        model: the parameters.
        layout: of the checkpoint: it may have a JSON list of names in the optimizer's order, all groups one after the
            other, and other checkpoints beside it.

    Returns:
        The optimizer without its frozen parameters, the names parallel to each group's `params`, and what had to be
        assumed.

    Raises:
        CheckpointError: the numbers of parameters do not agree, or the groups are not the Trainer's.
    """
    names, said = _group_names(saved, model, layout)
    return *_without_frozen(saved, names, model), said


def _group_names(saved: SavedOptimizer, model: Architecture, layout: Layout) -> tuple[GroupNames, list[str]]:
    path, _, groups = saved
    sizes = [len(group["params"]) for group in groups]
    written = [group.get("param_names") or () for group in groups]
    if [len(names) for names in written] == sizes:
        return [tuple(model.model_name(str(name)) for name in names) for names in written], []
    if layout.names is not None:
        listed = read_names(layout.names)
        if len(listed) != sum(sizes):
            raise CheckpointError(
                f"{layout.names} lists {len(listed)} names, {path.name} {sum(sizes)} parameters",
                cause="the two files of two different saves",
                fix=SAVE_AGAIN,
            )
        in_order = iter(map(model.model_name, listed))
        return [tuple(islice(in_order, size)) for size in sizes], []
    expected, how = _usual_groups(saved, model, sizes)
    said = [f"{path.name} has no parameter names: {how}."]
    if sizes != [len(names) for names in expected]:
        expected, trained = _trained_alone(saved, expected, model, layout)
        said.append(trained)
    if model.saved_by and model.saved_by.split(".")[:2] != model.read_by.split(".")[:2]:
        by = model.read_by
        said.append(f"Saved with transformers {model.saved_by}; parameter order and groups are those of {by}.")
    return expected, said


def _usual_groups(saved: SavedOptimizer, model: Architecture, sizes: list[int]) -> tuple[GroupNames, str]:
    """The groups that an optimizer of all trained parameters would have, and how that is known."""
    path, _, groups = saved
    if len(groups) == 1:
        # A frozen parameter may be listed: the optimizer then has no slot for it.
        everything = sizes == [len(model.everything)]
        one = tuple(model.everything if everything else model.trained)
        return [one], "one param group, taken to be model.parameters() in order"
    if len(groups) == 2:
        if groups[1]["params"] and as_float(groups[1]["weight_decay"]) != 0 and sizes[1] <= len(model.no_decay):
            fact = f"{path} decays its second param group too, so that the groups are not the Trainer's"
            raise CheckpointError(fact, cause="a custom create_optimizer", fix=SAVE_NAMES)
        how = "two param groups, taken to be the Trainer's: with weight decay, then without"
        return [model.decay, model.no_decay], how
    if len(groups) == 4 and model.of_model.keys() != model.everything.keys():
        return _lora_plus(model), "four param groups, taken to be LoRA+ as PEFT makes it"
    raise CheckpointError(
        f"{path} has {len(groups)} param groups and no parameter names",
        cause="a custom create_optimizer",
        fix="build the optimizer from named parameters (torch 2.6 or newer saves the names) and save again",
    )


def _lora_plus(model: Architecture) -> GroupNames:
    """As `peft.optimizers.create_loraplus_optimizer` has them: A, embeddings, B with weight decay, B without."""
    groups: tuple[list[str], ...] = ([], [], [], [])
    for name, shape in model.trained.items():
        if "lora_embedding_" in name:
            groups[1].append(name)
        elif "lora_B" in name or len(shape) == 1:
            groups[3 if "bias" in name else 2].append(name)
        else:
            groups[0].append(name)
    return [tuple(names) for names in groups]


def _trained_alone(
    saved: SavedOptimizer, expected: GroupNames, model: Architecture, layout: Layout
) -> tuple[GroupNames, str]:
    """The groups of an optimizer that lists fewer parameters than are in the model, and how that is known."""
    shapes = [[_shape(saved.slots.get(index)) for index in group["params"]] for group in saved.groups]

    def chosen(names: GroupNames) -> GroupNames:
        found = [only_choice(of, among, model.trained) for of, among in zip(shapes, names, strict=True)]
        return [] if [len(names) for names in found] != [len(of) for of in shapes] else [*map(tuple, found)]

    listed, total = sum(map(len, shapes)), sum(map(len, expected))
    said = (
        f"{saved.path.name} lists {listed} of {total} parameters: the trainer has frozen the others, which are known by"
    )
    if found := chosen(expected):
        return found, f"{said} their shapes."
    fits = all(len(of) <= len(names) for of, names in zip(shapes, expected, strict=True))
    same, other = unchanged_weights(layout) if fits else (set(), "")
    frozen = {model.model_name(name) for name in same}
    if found := chosen([tuple(name for name in names if name not in frozen) for names in expected]) if frozen else []:
        return found, f"{said} their weights, which are those of {other}."
    lacking = Counter(model.trained.values()) - Counter(shape for of in shapes for shape in of if shape is not None)
    among = [name for name, shape in model.trained.items() if shape in lacking]
    raise CheckpointError(
        f"{saved.path} lists {' + '.join(str(len(of)) for of in shapes)} parameters, the model has "
        f"{' + '.join(str(len(names)) for names in expected)}"
        + (f"; by shape, {lacking.total()} missing among {some_names(among)}" if among else ""),
        cause="frozen parameters, or a custom create_optimizer",
        fix="keep two checkpoints of the run side by side, which shows what was frozen; or write the names of the "
        f"trained parameters into optimizer_param_names.json beside it, in the optimizer's order; or {SAVE_NAMES}",
    )


def _shape(slot: dict[str, Any] | None) -> tuple[int, ...] | None:
    moment = next((slot[key] for key in ("exp_avg", "momentum_buffer", "exp_avg_sq") if slot and key in slot), None)
    return tuple(moment.shape) if isinstance(moment, Moment) else None


def _without_frozen(saved: SavedOptimizer, names: GroupNames, model: Architecture) -> tuple[SavedOptimizer, GroupNames]:
    """Leave out the parameters that are not trained; one of them with a slot is an error."""
    frozen = model.everything.keys() - model.trained.keys()
    if moved := [
        name
        for group, members in zip(saved.groups, names, strict=True)
        for index, name in zip(group["params"], members, strict=True)
        if name in frozen and saved.slots.get(index)
    ]:
        raise CheckpointError(
            f"{saved.path} has slots of parameters that the adapter does not train: {some_names(moved)}",
            cause="base weights were trained beside the adapter, and are not in the checkpoint",
            fix="train the adapter alone, or name those layers in modules_to_save",
        )
    kept = [
        [(index, name) for index, name in zip(group["params"], members, strict=True) if name not in frozen]
        for group, members in zip(saved.groups, names, strict=True)
    ]
    groups = [
        group | {"params": [index for index, _ in pairs]} for group, pairs in zip(saved.groups, kept, strict=True)
    ]
    return saved._replace(groups=groups), [tuple(name for _, name in pairs) for pairs in kept]
