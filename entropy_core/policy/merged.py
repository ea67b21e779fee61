"""Save a policy as one plain model: its adapter merged into the weights, in another number format."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def save_merged(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Save a model so that it can be loaded without PEFT.

    Args:
        model: of transformers, with or without the layers of an adapter; is not changed.
        directory: where `config.json` and `model*.safetensors` go.
        dtype: of the saved weights; an adapter is merged in the dtype of the model.
    """
    lasting = {parameter.data_ptr() for parameter in model.parameters()}  # what is merged has memory that is used again
    cast: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, weight in _merged_state(model):
        place = weight.data_ptr()
        if place in lasting and place in cast:
            weights[name] = cast[place]  # tied weights stay one tensor
            continue
        weights[name] = cast[place] = weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype)
    config = deepcopy(model.config)
    config.dtype = dtype
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.tie_word_embeddings and _weight(head).data_ptr() != _weight(embedding).data_ptr():
        config.tie_word_embeddings = False  # an adapter changed one of them
    before, model.config = model.config, config
    try:
        model.save_pretrained(directory, state_dict=weights)
    finally:
        model.config = before


def _merged_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names that they have without the adapter, merged one layer at a time."""
    ended: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(ended) and ended:
            continue
        own: Any = module
        if type(module).__module__.startswith("peft."):
            own = _merged(module)
            ended += (f"{path}.",)
        recurse = own is not module
        for name, weight in own.state_dict(keep_vars=True).items() if recurse else _direct(module):
            yield f"{path}.{name}" if path else name, weight.detach()


def _direct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    kept = module._non_persistent_buffers_set
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in kept)


def _merged(layer: Any) -> nn.Module:
    """A copy of the layer that the adapter's layer stands for, with what was trained."""
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save["default"]
    copy = deepcopy(layer)
    if hasattr(copy, "token_adapter"):
        copy.token_adapter.merge()
        return copy.token_adapter.get_base_layer()
    copy.merge()
    return copy.get_base_layer()


def _weight(module: Any) -> Tensor:
    return next(iter(module.state_dict(keep_vars=True).values()))
