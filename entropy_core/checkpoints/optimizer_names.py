"""Whose slot is whose: the parameter names of an optimizer's groups.

An optimizer numbers its parameters in the order of its groups, not in that of `named_parameters()`. The names come from
the optimizer when it saved them, else from a file beside it; otherwise the groups are rebuilt as the Trainer builds
them, and shapes must agree.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

from entropy_core.checkpoints.architecture import Architecture
from entropy_core.checkpoints.content import read_names
from entropy_core.checkpoints.layouts.interface import SavedOptimizer
from entropy_core.checkpoints.optimizer_file import SAVE_NAMES, as_float
from entropy_core.checkpoints.pieces import Moment
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN

GroupNames = list[tuple[str, ...]]


def name_slots(
    saved: SavedOptimizer, model: Architecture, names_file: Path | None = None
) -> tuple[SavedOptimizer, GroupNames, list[str]]:
    """Find the parameter names of every group.

    Args:
        saved: what `optimizer.pt` holds.
        model: the parameters.
        names_file: a JSON list of names in the optimizer's order, all groups one after the other.

    Returns:
        The optimizer without its frozen parameters, the names parallel to each group's `params`, and what had to be
        assumed.

    Raises:
        CheckpointError: the numbers of parameters do not agree, or the groups are not the Trainer's.
    """
    names, said = _group_names(saved, model, names_file)
    return *_without_frozen(saved, names, model), said


def _group_names(saved: SavedOptimizer, model: Architecture, names_file: Path | None) -> tuple[GroupNames, list[str]]:
    path, slots, groups = saved
    sizes = [len(group["params"]) for group in groups]
    written = [group.get("param_names") or () for group in groups]
    if [len(names) for names in written] == sizes:
        return [tuple(model.model_name(str(name)) for name in names) for names in written], []
    if names_file is not None:
        listed = read_names(names_file)
        if len(listed) != sum(sizes):
            raise CheckpointError(
                f"{names_file} lists {len(listed)} names, {path.name} {sum(sizes)} parameters",
                cause="the two files of two different saves",
                fix=SAVE_AGAIN,
            )
        in_order = iter(map(model.model_name, listed))
        return [tuple(islice(in_order, size)) for size in sizes], []
    if len(groups) == 1:
        # A frozen parameter may be listed: the optimizer then has no slot for it.
        everything = sizes == [len(model.everything)]
        expected = [tuple(model.everything if everything else model.trained)]
        how = "one param group, taken to be model.parameters() in order"
    elif len(groups) == 2:
        expected = [model.decay, model.no_decay]
        how = "two param groups, taken to be the Trainer's: with weight decay, then without"
    else:
        raise CheckpointError(
            f"{path} has {len(groups)} param groups and no parameter names",
            cause="a custom create_optimizer",
            fix="build the optimizer from named parameters (torch 2.6 or newer saves the names) and save again",
        )
    if sizes != [len(names) for names in expected]:
        moments = [slot.get("exp_avg") for slot in slots.values()]
        lacking = Counter(model.trained.values()) - Counter(tuple(m.shape) for m in moments if isinstance(m, Moment))
        among = [name for name, shape in model.trained.items() if shape in lacking]
        raise CheckpointError(
            f"{path} lists {' + '.join(map(str, sizes))} parameters, the model has "
            f"{' + '.join(str(len(names)) for names in expected)}"
            + (f"; by shape, {lacking.total()} missing among {some_names(among)}" if among else ""),
            cause="frozen parameters, or a custom create_optimizer",
            fix=f"train all parameters, or {SAVE_NAMES}",
        )
    if len(groups) == 2 and groups[1]["params"] and as_float(groups[1]["weight_decay"]) != 0:
        fact = f"{path} decays its second param group too, so that the groups are not the Trainer's"
        raise CheckpointError(fact, cause="a custom create_optimizer", fix=SAVE_NAMES)
    said = [f"{path.name} has no parameter names: {how}."]
    if model.saved_by and model.saved_by.split(".")[:2] != model.read_by.split(".")[:2]:
        by = model.read_by
        said.append(f"Saved with transformers {model.saved_by}; parameter order and groups are those of {by}.")
    return expected, said


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
