"""The moments of torchao's AdamW, which are tensors of its own class: codes, scales and the values of the codes."""

from pathlib import Path
from typing import Any

import torch

from entropy_core.checkpoints.inert_pickle import Inert
from entropy_core.checkpoints.layouts.interface import number
from entropy_core.checkpoints.pieces import Quantised, Scattered, in_one_piece
from entropy_core.checkpoints.stored_tensors import StoredTensor, integers, plain_dict
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN


def plain_state(path: Path, saved: Any) -> Any:
    """Open a state whose moments are torchao's.

    Args:
        path: of the file, for errors.
        saved: what `read_archive` found in it.

    Returns:
        The same with moments as `pieces` has them, and tensors of one number as numbers.

    Raises:
        CheckpointError: moments of another class, of weights that are not float32, or damaged.
    """

    def opened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: opened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [opened(item) for item in value]
        if isinstance(value, StoredTensor):
            return number(value) if value.numel() == 1 else in_one_piece(value)
        return _torchao_moment(path, value) if isinstance(value, Inert) else value

    found = opened(saved)
    for slot in plain_dict(plain_dict(found).get("state")).values():
        if any(isinstance(moment, Scattered) and moment.dtype != torch.float32 for moment in plain_dict(slot).values()):
            raise _narrow_torchao(path)
    return found


def _torchao_moment(path: Path, moment: Inert) -> Quantised:
    kind, state = moment.name.rpartition(".")[2], plain_dict(moment.state)
    bits = {"OptimState8bit": 8, "OptimState4bit": 4}.get(kind)
    if bits is None:
        fact = f"{path} has moments in torchao's {kind}"
        raise CheckpointError(
            fact,
            cause="torchao's AdamWFp8, or CPU offload",
            fix="train with its AdamW8bit or AdamW4bit, or with torch's AdamW",
        )
    dtype, shape = moment.arguments if len(moment.arguments) == 2 else (None, None)
    if not isinstance(dtype, Inert) or dtype.name != "torch.float32":
        raise _narrow_torchao(path)
    parts = [state.get(key) for key in ("codes", "qmap", "scale")]
    stored = [part for part in parts if isinstance(part, StoredTensor)]
    sizes, block = integers(shape), state.get("block_size")
    if sizes is None or type(block) is not int or len(stored) != len(parts):
        raise CheckpointError(f"{path} has a moment of torchao without its codes or scales", fix=SAVE_AGAIN)
    codes, qmap, scale = stored
    try:
        return Quantised(codes, qmap.flat(0, qmap.numel()), scale.flat(0, scale.numel()), sizes, bits, block)
    except ValueError as error:
        raise CheckpointError(f"{path}: a moment of torchao has {error}", fix=SAVE_AGAIN) from error


def _narrow_torchao(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is of torchao's AdamW on weights that are not float32, which it rounds in a way that the "
        "file does not say (bf16_stochastic_round)",
        fix="train float32 weights, with autocast, or with torch's AdamW",
    )
