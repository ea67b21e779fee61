"""DoRA: layers whose trainer holds the norm of the weight fixed in its gradient.

    y = m/‖W + s·BA‖ · (Wx + s·BAx)          ‖·‖ for each output, m trained

The trainer takes the norm for a constant (arXiv:2402.09353, section 4.3), so that its gradient is not that of the
policy. The norm moves all the same when the step is taken: derivatives of the entropy along the step count it, and so
does the gradient of the entropy. Only the gradient of the loss on U, and what comes of single tokens of U, is the
trainer's: `held_norms` is around that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def let_norms_move(model: Any) -> list[str]:
    """Let the norms of DoRA's layers count in derivatives; in place.

    Args:
        model: with PEFT's layers.

    Returns:
        Names of the layers of DoRA that are not linear ones, which stay as they are.
    """
    others = []
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if kind == "DoraLinearLayer":
            layer.norm_is_held = False
            layer.forward = MethodType(_forward, layer)
        elif kind.startswith("Dora"):
            others.append(name)
    return others


@contextmanager
def held_norms(model: nn.Module) -> Iterator[None]:
    """Hold the norms of DoRA's layers fixed in derivatives, as the trainer's gradient does."""
    layers: list[Any] = [layer for layer in model.modules() if "norm_is_held" in vars(layer)]
    for layer in layers:
        layer.norm_is_held = True
    try:
        yield
    finally:
        for layer in layers:
            layer.norm_is_held = False


def _forward(
    layer: Any,
    x: Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """What PEFT's layer adds to the base layer's output."""
    weight = base_layer.weight.T if layer.fan_in_fan_out else base_layer.weight
    added = lora_B.weight @ lora_A.weight
    norm = torch.linalg.norm(weight + scaling * added, dim=1)
    if layer.norm_is_held:
        norm = norm.detach()
    ratio = layer.weight / norm
    if base_result is None:
        base_result = x @ weight.T
    elif base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    return (ratio - 1) * base_result + ratio * (scaling * lora_B(lora_A(x)))
