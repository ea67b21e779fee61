"""The base under an adapter whose initialisation changed it: PiSSA and OLoRA take the first factors out of it.

    PiSSA   W' = W − U_r S_r V_rᵀ      the greatest singular values (arXiv:2404.02948)
    OLoRA   W' = W − s·Q_r R_r         the first columns of a QR decomposition (arXiv:2406.01775)

The base on disk is either W, as downloaded, or W', saved by whoever trained. Which one it is, the adapter shows: it
began as what was taken out of W, and in W' there is nothing like it left. The decompositions are those of PEFT.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FACTORS_OF = ("pissa", "olora")
"""Initialisations that can be repeated; those of `pissa_niter_N` are random, and only W' is of use with them."""

NEAR, FAR = 0.25, 0.5
"""Relative distance of the adapter from its beginning up to which the base is W, and from which it is W'."""


class Layer(NamedTuple):
    """A linear layer with an adapter.

    Attributes:
        weight: of the base, [out, in].
        added: s·BA as saved, [out, in].
        rank: r.
        scaling: s.
    """

    weight: Tensor
    added: Tensor
    rank: int
    scaling: float


def taken_out(layer: Layer, initialisation: str) -> Tensor:
    """What the initialisation takes out of the weight, [out, in] float32, and what the adapter begins as."""
    weight = layer.weight.to(torch.float32)
    if initialisation.startswith("pissa"):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, : layer.rank] * s[: layer.rank]) @ vh[: layer.rank]
    q, r = torch.linalg.qr(weight)
    return layer.scaling * (q[:, : layer.rank] @ r[: layer.rank])


def distance(layer: Layer, began: Tensor) -> float:
    """How far the adapter is from a beginning, relative to itself."""
    size = float(layer.added.float().norm())
    return float((layer.added.float() - began).norm()) / size if size else float("inf")
