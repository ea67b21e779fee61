"""The attention of forward mode: in blocks where that computes what the model's own attention does."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from entropy_core.numerics.blockwise_attention import attention
from entropy_core.policy.attention import attention_set
from entropy_core.policy.model import Policy

BLOCKWISE = "blockwise"  # its name in transformers' registry

TOLERANCE, IN_BF16 = 1e-3, 0.1
"""Of the last hidden states, relative to the largest: above rounding, below what another mask or a bias makes of them.
"""

log = logging.getLogger("entropy_probe.policy")


class VisibleKeys:
    """What transformers makes a mask of, a block of queries at a time; the layers of a pass share it.

    Args:
        mask_function: whether (batch, head, query, key) is visible, of tensors that are broadcast.
        batch: number of sequences.
        queries: number of queries.
        keys: number of keys.
        device: of the masks.
    """

    def __init__(
        self, mask_function: Callable[..., Tensor], batch: int, queries: int, keys: int, device: torch.device | str
    ) -> None:
        self._function, self._batch, self.device = mask_function, torch.arange(batch, device=device), device
        self._sizes = batch, queries, keys
        self._causal = mask_function is causal_mask_function and queries == keys
        self._keys = torch.arange(keys, device=device)
        self._known: dict[tuple[int, int], tuple[int, int, Tensor | None]] = {}

    def to(self, device: torch.device) -> "VisibleKeys":
        """Return the same for layers on another device."""
        return VisibleKeys(self._function, *self._sizes, device)

    def __call__(self, start: int, stop: int) -> tuple[int, int, Tensor | None]:
        """See `Visible`."""
        if (start, stop) not in self._known:
            self._known[start, stop] = self._found(start, stop)
        return self._known[start, stop]

    def _found(self, start: int, stop: int) -> tuple[int, int, Tensor | None]:
        queries = torch.arange(start, stop, device=self.device)
        if self._causal:  # only the keys at the diagonal are seen by some and not by others
            return 0, stop, (self._keys[start:stop] > queries[:, None])[None, None]
        batch, head = self._batch[:, None, None, None], self._batch[:1, None, None, None]
        seen = self._function(batch, head, queries[:, None], self._keys)
        seen = seen.expand(len(seen) if seen.dim() == 4 else 1, 1, len(queries), len(self._keys))
        of_any = seen.flatten(0, 2).any(0).nonzero()
        first, last = int(of_any[0]), int(of_any[-1]) + 1
        return first, last, ~seen[..., first:last]


def _visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> VisibleKeys:
    if attention_mask is not None or q_offset or kv_offset:
        raise NotImplementedError("blockwise attention has no padding on the left and no cache")
    return VisibleKeys(mask_function, batch_size, q_length, kv_length, device)


def _blockwise(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name in ("s_aux", "position_bias", "cache") if others.get(name) is not None]
    if unknown or not isinstance(attention_mask, VisibleKeys):
        raise NotImplementedError(f"blockwise attention does not know {', '.join(unknown) or 'this mask'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, scaling, attention_mask, softcap).transpose(1, 2), None


AttentionInterface.register(BLOCKWISE, _blockwise)
AttentionMaskInterface.register(BLOCKWISE, _visible_keys)


def forward_mode_attention(policy: Policy) -> str:
    """Return the attention for forward mode: `blockwise` if it computes what the model's own does, else the own.

    It is found out once for each policy, by a pass over a few tokens with either.
    """
    if policy.forward_mode_attention is None:
        policy.forward_mode_attention = _found(policy.model, policy.own_attention)
    return policy.forward_mode_attention


def _found(model: PreTrainedModel, own: str) -> str:
    if not model._can_set_attn_implementation():
        return own
    count = min(8, model.get_input_embeddings().weight.shape[0])
    input_ids = torch.arange(count, device=model.device).unsqueeze(0)

    def hidden() -> Tensor:
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    with torch.no_grad(), attention_set(model, own):
        expected = hidden()
        try:
            with attention_set(model, BLOCKWISE):
                found = hidden()
        except Exception as error:  # a mask, a bias or a signature of another kind
            log.debug("blockwise attention cannot compute %s: %s", type(model).__name__, error)
            found = torch.full_like(expected, torch.inf)
    tolerance = TOLERANCE if expected.itemsize >= 4 else IN_BF16
    if (found - expected).abs().max() <= tolerance * expected.abs().max():
        return BLOCKWISE
    log.warning(
        "%s has an attention that cannot be computed in blocks; the memory of forward mode grows with the square of "
        "the length of a sequence",
        type(model).__name__,
    )
    return own
