"""The attention of passes that are not differentiated forward: torch's fused kernel, where the model allows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

UNGROUPED = "ungrouped"  # its name in transformers' registry


def _ungrouped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Torch's fused attention, with a head of the key for every head of the query."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.shape[2] > 1:  # for a single query there is nothing to gain
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        module = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(UNGROUPED, _ungrouped)
AttentionMaskInterface.register(UNGROUPED, sdpa_mask)


def plain_attention(model: PreTrainedModel) -> str:
    """Return the attention for passes that are not differentiated forward: torch's fused kernel, or the model's own.

    The fused kernel has no softcap of the scores, so that a model with one keeps its own attention. For float32 on a
    GPU there is none for fewer heads of the key than of the query: torch would compute the whole matrix of scores.
    """
    config = model.config.get_text_config()
    fused = model._supports_sdpa and model._can_set_attn_implementation()
    if not fused or getattr(config, "attn_logit_softcapping", None):
        return model.config._attn_implementation
    heads = getattr(config, "num_attention_heads", None)
    grouped = getattr(config, "num_key_value_heads", heads) != heads
    return UNGROUPED if grouped and model.device.type == "cuda" and model.dtype == torch.float32 else "sdpa"


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Context in which the model computes with another attention."""
    own = model.config._attn_implementation
    if name == own:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
