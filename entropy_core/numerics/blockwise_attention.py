"""Exact attention with its forward-mode derivative, in memory that grows with the length and not with its square.

For a block of queries, with the keys and values of all positions that it sees:

    S = QKᵀ·s, with a softcap c then c·tanh(S/c),     P = softmax S,   O = PV
    Ṡ = (Q̇Kᵀ + QK̇ᵀ)·s, with a softcap ·(1 − tanh²),  Ȯ = (P∘Ṡ)V − rowsum(P∘Ṡ)∘O + PV̇

Under autocast the matrix products are computed in its dtype, and everything else in float32. The mean key is taken off
first, which changes neither P nor Ȯ, and leaves smaller numbers to be rounded.

No fused kernel of torch has a forward-mode derivative, and torch's own one keeps several matrices of length × length.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

CPU_BYTES = 2**23
"""Size of the scores of a block on a CPU: small enough for its cache."""

DEVICE_BYTES = 2**27
"""The same on a GPU, where few large operations are faster than many small ones."""


class Visible(Protocol):
    """Which keys a query sees."""

    def __call__(self, start: int, stop: int) -> tuple[int, int, Tensor | None]:
        """Say what the queries `start:stop` see.

        Returns:
            `first` and `last`, where `first:last` are the keys that any of them sees; and a mask [B or 1, 1, queries,
            n] of the last n of these keys, True where a query does not see a key. None: each sees all of them.
        """
        ...


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Visible, softcap: float | None = None
) -> Tensor:
    """Compute attention, and its tangent if an operand is dual.

    Args:
        query: [B, H, T, D].
        key: [B, J, U, D]; H is a multiple of J, and each head of the key serves H/J heads of the query.
        value: [B, J, U, E].
        scaling: s.
        visible: which keys a query sees; each must see one.
        softcap: c; None for none.

    Returns:
        O, [B, H, T, E], under autocast in float32; dual if an operand is.
    """
    (q, dq), (k, dk), (v, dv) = map(forward_ad.unpack_dual, (query, key, value))
    if torch.is_autocast_enabled(q.device.type):
        narrow = torch.get_autocast_dtype(q.device.type)
        q, dq = (None if x is None else x.float() for x in (q, dq))
        if softcap is None:  # the softmax is the same without what all keys share, of which the rounding would remain
            k, dk = (None if x is None else x.float() - x.float().mean(2, keepdim=True) for x in (k, dk))
        k, dk, v, dv = (None if x is None else x.to(narrow) for x in (k, dk, v, dv))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).to(q.dtype)

    (B, H, T, _), (J, U) = q.shape, k.shape[1:3]
    out = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
    dout = None
    if not (dq is None and dk is None and dv is None):
        dout = torch.empty_like(out)
        dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    limit = CPU_BYTES if q.device.type == "cpu" else DEVICE_BYTES
    rows = max(1, limit // (B * H * U * q.itemsize))
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first, last, hidden = visible(start, stop)
        by_group = (B, J, H // J * (stop - start), -1)  # the queries of a group of heads share a matrix of keys
        by_head = (B, H, stop - start, -1)
        q_block = (q[:, :, start:stop] * scaling).reshape(by_group)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        scores = product(q_block, keys.mT)
        bend = None
        if softcap is not None:
            bend = scores.div_(softcap).tanh_()
            scores = bend * softcap
        if hidden is not None:
            scores.view(by_head)[..., -hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1)
        o = product(weights, values)
        out[:, :, start:stop] = o.view(by_head)
        if dout is None:
            continue
        del scores
        moved = product((dq[:, :, start:stop] * scaling).reshape(by_group), keys.mT)
        moved += product(q_block, dk[:, :, first:last].mT)
        if bend is not None:
            moved.mul_(bend.square_().neg_().add_(1))
        moved.mul_(weights)
        do = product(moved, values)
        do.addcmul_(moved.sum(-1, keepdim=True), o, value=-1)
        do += product(weights, dv[:, :, first:last])
        dout[:, :, start:stop] = do.view(by_head)
    return out if dout is None else forward_ad.make_dual(out, dout)
