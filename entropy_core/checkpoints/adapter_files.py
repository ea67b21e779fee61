"""Where the settings and the weights of an adapter lie.

adapter_config.json, adapter_model.safetensors    as PEFT saves it, and verl in `lora_adapter/`
lora_train_meta.json, model_world_size_*          verl's shards, which hold the base as well: the settings are the
                                                  rank and the alpha of that file, and the names of the factors
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_core.checkpoints.content import StoredTensor, load_tensors, read_json, stored_tensors
from entropy_core.checkpoints.layouts.interface import understood
from entropy_core.checkpoints.layouts.per_rank import PerRank
from entropy_core.checkpoints.pieces import Scattered, headers_of
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_META = "lora_train_meta.json"
PEFT_PREFIX = "base_model.model."  # of PEFT's wrapper, in its names of parameters and of saved tensors

_TWICE = ".modules_to_save."
_FACTOR = re.compile(r"(.+)\.lora_[AB]\.default\.weight")


def adapter_base(directory: Path) -> str:
    """The base model that an adapter says it was trained on: a path or a name, or "" if it does not say.

    Raises:
        CheckpointError: what it says can be neither, or the configuration cannot be read.
    """
    path = directory / ADAPTER_CONFIG
    if not path.exists() and (directory / LORA_META).exists():
        return ""
    named = read_json(path).get("base_model_name_or_path") or ""
    try:
        Path(named).expanduser().is_dir()
    except (TypeError, RuntimeError, OSError, ValueError):  # no text, a user that is not there, too long
        fact = f"{path} names the base model {named!r:.80}, which can be no path"
        raise CheckpointError(fact, cause="the file was edited", fix=SAVE_AGAIN) from None
    return named


def adapter_settings(directory: Path) -> dict[str, Any]:
    """The settings of an adapter, by PEFT's names.

    Raises:
        CheckpointError: the file cannot be read, or says no rank and no alpha.
    """
    if (directory / ADAPTER_CONFIG).exists() or not (directory / LORA_META).exists():
        return read_json(directory / ADAPTER_CONFIG)
    said = read_json(directory / LORA_META)
    rank, alpha = said.get("r"), said.get("lora_alpha")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 2**31
    if not is_rank or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{directory / LORA_META} has r {rank!r:.40} and lora_alpha {alpha!r:.40}",
            cause="the file was edited, or the run had no LoRA",
            fix=SAVE_AGAIN,
        )
    modules = {match[1] for name, _ in _in_shards(directory).values() if (match := _FACTOR.fullmatch(name))}
    targets = sorted(module.removeprefix(PEFT_PREFIX) for module in modules)
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}


def adapter_tensors(directory: Path) -> dict[str, StoredTensor]:
    """What the adapter's file holds, by the base model's names of modules; only headers are read.

    Of a resized vocabulary PEFT saves trained embeddings twice, the second time under the name of their wrapper.
    """
    if not (directory / ADAPTER_CONFIG).exists():
        return {name: of for name, (_, of) in _in_shards(directory).items()}
    found = {name.removeprefix(PEFT_PREFIX): of for name, of in stored_tensors(directory, ADAPTER_WEIGHTS).items()}
    return {name: of for name, of in found.items() if not (_TWICE in name and name.replace(_TWICE, ".") in found)}


def load_adapter(directory: Path) -> "dict[str, Tensor]":
    """The weights of an adapter, by the same names as in `adapter_tensors`."""
    if (directory / ADAPTER_CONFIG).exists():
        loaded = {name.removeprefix(PEFT_PREFIX): t for name, t in load_tensors(directory / ADAPTER_WEIGHTS).items()}
        return {name: loaded[name] for name in adapter_tensors(directory)}
    weights = _shards(directory)
    return {name: weights[saved_as].whole() for name, (saved_as, _) in _in_shards(directory).items()}


def _in_shards(directory: Path) -> dict[str, tuple[str, StoredTensor]]:
    """The factors in shards: their names there, and their headers, by the names that PEFT would save them under."""
    found = {}
    for name, of in headers_of(_shards(directory), directory).items():
        if ".lora_" in name:
            found[name.removeprefix(PEFT_PREFIX).replace(".default.", ".")] = name, of
    if not found:
        fact = f"{directory} has a {LORA_META}, and no factors of LoRA in its shards"
        raise CheckpointError(fact, cause="files of two runs in one folder", fix=SAVE_AGAIN)
    return found


def _shards(directory: Path) -> "Mapping[str, Scattered]":
    with understood(directory):
        return PerRank(directory).weights()
