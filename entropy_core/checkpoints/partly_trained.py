"""Which parameters an optimizer lists, where it lists fewer than the model has and saved no names.

A trainer leaves out what it has frozen and keeps the order of the others. So the shapes of the slots tell which
parameters they are, if only one choice of them has these shapes in this order. Otherwise the weights tell: a frozen
parameter has the same numbers in two checkpoints of one run, and a trained one does not.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from entropy_core.checkpoints.content import load_tensor, stored_tensors
from entropy_core.checkpoints.layout import Layout
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import model_directory

Shape = tuple[int, ...] | None  # of a slot; None where it is not known


def only_choice(shapes: Sequence[Shape], names: Sequence[str], shape_of: dict[str, tuple[int, ...]]) -> list[str]:
    """The only choice of names, in their order, that have these shapes.

    Args:
        shapes: of the slots, in the optimizer's order.
        names: to choose from, in the order in which the optimizer would list all of them.
        shape_of: the shape of each name.

    Returns:
        One name per slot; empty if there is no such choice, or more than one.
    """
    first, last = (_greedy(shapes, names, shape_of, backwards) for backwards in (False, True))
    return first if first == last else []


def _greedy(
    shapes: Sequence[Shape], names: Sequence[str], shape_of: dict[str, tuple[int, ...]], backwards: bool
) -> list[str]:
    """The first choice from the front, or from the back; where both are the same, there is no other."""
    order = -1 if backwards else 1
    left, chosen = iter(names[::order]), []
    for shape in shapes[::order]:
        name = next((name for name in left if shape in (None, shape_of[name])), None)
        if name is None:
            return []
        chosen.append(name)
    return chosen[::order]


def unchanged_weights(layout: Layout) -> tuple[set[str], str]:
    """The stored tensors of a full model that are bit for bit those of another checkpoint of its run.

    Args:
        layout: of the checkpoint.

    Returns:
        Their names in the file; and the name of the other checkpoint, the nearest by step, empty if there is none.
    """
    other = None if layout.base is not None or layout.shards is not None else _neighbour(layout)
    if other is None:
        return set(), ""
    import torch

    ours, theirs = ({name: of.file for name, of in stored_tensors(d).items()} for d in (layout.model, other))
    return {
        name
        for name, file in ours.items()
        if torch.equal(load_tensor(layout.model / file, name), load_tensor(other / theirs[name], name))
    }, other.name


def _neighbour(layout: Layout) -> Path | None:
    """The model of the nearest other checkpoint in the same run directory that holds the same tensors."""
    own = re.fullmatch(r"checkpoint-(\d+)", layout.directory.resolve().name)
    if own is None:
        return None
    steps: dict[Path, int] = {}
    for path in layout.directory.resolve().parent.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and path.is_dir() and path != layout.directory.resolve():
            steps[path] = abs(int(step[1]) - int(own[1]))
    here = {name: of.shape for name, of in stored_tensors(layout.model).items()}
    for path in sorted(steps, key=lambda path: (steps[path], path)):
        try:
            model = model_directory(path)
            if here == {name: of.shape for name, of in stored_tensors(model).items()}:
                return model
        except (CheckpointError, OSError):  # half-written, or rotated away
            continue
    return None
