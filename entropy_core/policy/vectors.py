"""Vectors of the size of the policy that lie in a file."""

from typing import TYPE_CHECKING

from entropy_core.numerics.vectors import Block, Lazy, blocks_of
from entropy_core.policy.model import Policy

if TYPE_CHECKING:
    from entropy_core.store.tensor_file import TensorFile


def stored_vector(file: "TensorFile", policy: Policy) -> Lazy[Block]:
    """Read a vector block by block, on every access anew.

    Args:
        file: with a tensor for each trained parameter.
        policy: whose parameters they are.

    Returns:
        Float64, on the device where the arithmetic on the parameter is done.
    """
    blocks = blocks_of(policy.named_parameters())
    return Lazy(blocks, lambda block: file.block(block).to(policy.device_of[block.name]).double())
