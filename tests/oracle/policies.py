"""Tiny policies of several architectures, and how they are given a law."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from conftest import COMMON
from lora_fixtures import with_adapter
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
}
OF_GPT2 = {"n_positions": 16, "n_embd": 6, "n_layer": 1, "n_head": 2, "n_inner": 8}
OF_GEMMA = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 4}
ADAPTED = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "fan_in_fan_out": False}


CASTS = (torch.Tensor.to, nn.functional.softmax)


class Float64(TorchFunctionMode):
    """Where an architecture computes norms, angles or a softmax in float32, it computes them in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.float and args[0].dtype in (torch.float64, torch.int64):
            return args[0].double()
        if function in CASTS and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in kwargs.items()}
        return function(*args, **kwargs)


@contextmanager
def in_float64(policy_dtype: torch.dtype) -> Iterator[None]:
    """`Float64` for a policy in float64; nothing for another."""
    if policy_dtype != torch.float64:
        yield
        return
    with Float64():
        yield


def _seeded(make: Callable[[int], PreTrainedModel]) -> Callable[[int], PreTrainedModel]:
    def model(vocabulary: int) -> PreTrainedModel:
        torch.manual_seed(14)
        return make(vocabulary).double()

    return model


def _common(vocabulary: int) -> dict[str, Any]:
    return COMMON | {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1}


def _lora(vocabulary: int) -> PreTrainedModel:
    """An adapter whose second factor has moved from 0, as after some training."""
    base = LlamaForCausalLM(LlamaConfig(**_common(vocabulary) | SMALL))
    adapted = with_adapter(base, **ADAPTED)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.5)
    return adapted.base_model.model


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "GPT-2": _seeded(lambda v: GPT2LMHeadModel(GPT2Config(**_common(v) | OF_GPT2))),
    "GPT-2, untied": _seeded(lambda v: GPT2LMHeadModel(GPT2Config(**_common(v) | OF_GPT2, tie_word_embeddings=False))),
    "Llama": _seeded(lambda v: LlamaForCausalLM(LlamaConfig(**_common(v) | SMALL))),
    "Gemma 2": _seeded(lambda v: Gemma2ForCausalLM(Gemma2Config(**_common(v) | SMALL | OF_GEMMA))),
    "Qwen 3": _seeded(lambda v: Qwen3ForCausalLM(Qwen3Config(**_common(v) | SMALL))),
    "Llama, LoRA": _seeded(_lora),
}


def sharpened(model: PreTrainedModel, entropy: Callable[[], float], target: float) -> None:
    """Scale the last norm, and with it the logits, until the entropy is `target` nats per token."""
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm")]
    weight = norms[-1].weight
    low, high, own = 1.0, 200.0, weight.detach().clone()
    for _ in range(40):
        middle = (low * high) ** 0.5
        with torch.no_grad():
            weight.copy_(own * middle)
        low, high = (middle, high) if entropy() > target else (low, middle)


def fitted(
    model: PreTrainedModel, logprobs: Callable[[], Tensor], target_SV: Tensor, weight_S: Sequence[float] | Tensor
) -> None:
    """Train a policy towards a law: cross-entropy at each state, so that rare states count, too."""
    weights_S = torch.as_tensor(weight_S, dtype=torch.float64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        loss = -(weights_S[:, None] * target_SV * logprobs()).sum()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
