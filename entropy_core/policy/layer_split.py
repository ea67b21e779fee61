"""A model whose layers are divided among several devices of one machine, for a model that is too large for one.

Everything that is not a layer stays on the first device: embeddings, the last norm and the head. Hidden states go from
device to device between two layers and come back after the last one; copying has a derivative of either mode, so every
pass is the same. Each device computes what one would, so the numbers are those of one device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError


def devices_for(first: torch.device, count: int) -> list[torch.device]:
    """Return the devices of a policy: the first GPUs that this process sees, or the CPU as often.

    Args:
        first: kind of device.
        count: number of devices.
    """
    return [torch.device(first.type, number) if first.type == "cuda" else first for number in range(count)]


def split_layers(model: PreTrainedModel, devices: Sequence[torch.device]) -> None:
    """Put the layers of a model on several devices, in order, about as many bytes on each.

    Args:
        model: a causal language model.
        devices: at least two; what is not a layer is on the first one. One may be named twice, for a test.

    Raises:
        CheckpointError: the model has no layers that can be divided.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    owners = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if not layers or len(owners) > len(set(owners)):
        raise CheckpointError(
            f"{type(model).__name__} cannot be divided among {len(devices)} devices",
            cause="its layers share parameters, or it has no layers that transformers knows",
            fix="set execution.devices_per_policy: 1",
        )
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(partial(_to, devices[0]), recurse=False)
    places = _places(model, layers, len(devices))
    shared: list[_Shared] = [_Shared(device) for device in devices]
    for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
        layer.to(devices[place])
        if place != (places[number - 1] if number else 0):
            layer.register_forward_pre_hook(shared[place].hand_over, with_kwargs=True)
        layer.register_forward_pre_hook(shared[place].bring, with_kwargs=True)
        if places[number + 1 :][:1] != [place]:
            layer.register_forward_hook(shared[place].forget)
    layers[-1].register_forward_hook(lambda _, __, output: _mapped(output, partial(_copied, devices[0])))


def _places(model: nn.Module, layers: Sequence[nn.Module], count: int) -> list[int]:
    """The number of the device of each layer: that in whose equal part of all bytes the middle of the layer is."""
    sizes = [_bytes(layer) for layer in layers]
    total = _bytes(model)
    before, places = total - sum(sizes), []
    for size in sizes:
        places.append(min(count - 1, int(count * (before + size / 2) / total)))
        before += size
    return places


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


class _Shared:
    """What the layers of a device are given alike, such as a mask, brought there once for each pass.

    Args:
        device: of these layers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._brought: dict[int, tuple[Any, Any]] = {}  # by identity, with what it is of, which so stays alive

    def hand_over(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before the first of the layers: copy the hidden states, also where the device is the same."""
        states = (args or tuple(kwargs.values()))[0]
        return _mapped((args, kwargs), lambda value: _copied(self._device, value) if value is states else value)

    def bring(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before each of the layers: give it everything where its parameters are."""
        return _mapped((args, kwargs), self._there)

    def forget(self, *_: Any) -> None:
        """After the last of the layers: free what was brought."""
        self._brought.clear()

    def _there(self, value: Any) -> Any:
        if getattr(value, "device", None) == self._device:
            return value
        if id(value) not in self._brought:
            self._brought[id(value)] = value, value.to(self._device)
        return self._brought[id(value)][1]


def _to(device: torch.device, value: Tensor) -> Tensor:
    return value.to(device)


def _copied(device: torch.device, value: Tensor) -> Tensor:
    return value.to(device, copy=True)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """What a layer is given or returns, with everything in it changed that lies on a device."""
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(one, change) for one in value)
    return change(value) if hasattr(value, "to") and hasattr(value, "device") else value
