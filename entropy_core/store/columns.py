"""Per-token columns on disk: flat tensors with offsets, one file per shard. Needs no model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.numerics import ragged

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact


def read_columns(shards: "Sequence[Artifact]", *names: str) -> tuple[dict[str, Tensor], Tensor]:
    """Per-token columns of all shards, one after the other.

    Args:
        shards: artifacts with `tokens.safetensors`, holding `offsets` and the columns.
        names: of the columns.

    Returns:
        Each column [K] by name, and the offsets [N + 1] of all sequences.
    """
    files = [shard.tensors("tokens.safetensors") for shard in shards]
    columns = {name: torch.cat([file[name] for file in files]) for name in names}
    return columns, ragged.concatenate([file["offsets"] for file in files])
