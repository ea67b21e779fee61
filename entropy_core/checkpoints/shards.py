"""Weights that a trainer left in shards, which transformers cannot open."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from entropy_core.checkpoints.content import StoredTensor
from entropy_core.checkpoints.layouts.interface import understood
from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.checkpoints.pieces import Scattered, headers_of
from entropy_core.numerics.vectors import BLOCK, Block


def tensors_in_shards(place: Path) -> dict[str, StoredTensor]:
    """Shapes and dtypes of the weights, as the header of a safetensors file would say them; no weight is read.

    Args:
        place: file or folder of the shards.

    Returns:
        By the model's name.

    Raises:
        CheckpointError: a shard is missing, damaged, or of another save.
    """
    return headers_of(shards_of_weights(place), place)


def shards_of_weights(place: Path) -> Mapping[str, Scattered]:
    """The weights, each read when it is used. Raises CheckpointError as `tensors_in_shards` does."""
    with understood(place):
        return open_state(place).weights()


def read_shards(place: Path) -> Iterator[tuple[Block, torch.Tensor]]:
    """All of the weights, a block at a time.

    Args:
        place: file or folder of the shards.

    Returns:
        Blocks under the model's names, each with its numbers, flat, in the dtype that they were saved in.

    Raises:
        CheckpointError: as `tensors_in_shards` does.
    """
    with understood(place):
        for name, tensor in shards_of_weights(place).items():
            for start in range(0, tensor.numel(), BLOCK):
                stop = min(start + BLOCK, tensor.numel())
                yield Block(name, start, stop), tensor.flat(start, stop)
