"""One file of torch.save: `optimizer.pt` of the Trainer, and what FSDP gathers into `optimizer.bin`.

With FSDP's full state dict the optimizer's parameters have names in place of numbers; without FSDP, accelerate's
`save_state` writes a plain state dict under the same name.
"""

import json
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.checkpoints.archives import map_file, read_archive
from entropy_core.checkpoints.content import stored_tensors
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, by_name, model_name
from entropy_core.checkpoints.layouts.torchao_moments import plain_state
from entropy_core.checkpoints.pieces import Quantised, Scattered, in_one_piece
from entropy_core.checkpoints.stored_tensors import StoredTensor, plain_dict
from entropy_core.errors import CheckpointError, one_line, shortage
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.files.regular import require_readable

KNOWN_STEPS = (
    "probe a checkpoint that was trained with torch's AdamW (optim='adamw_torch' or 'adamw_torch_fused'), SGD, Lion, "
    "Adafactor or Muon"
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OF_BITSANDBYTES = "bitsandbytes"
"""Key of a group whose moments bitsandbytes keeps, in codes or in float32, whatever dtype the weights have."""
_QUANTISED = "__bnb_optimizer_quant_state__"


class OptimizerFile:
    """An optimizer's state dict in one file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def weights(self) -> Mapping[str, Scattered]:
        """There are none in it."""
        return {}

    def optimizer(self) -> SavedOptimizer:
        """Slots and groups; the tensors are on the CPU and map the file privately."""
        saved = _load(self._path)
        saved = saved if isinstance(saved, dict) else {}
        slots: Any = saved.get("state")
        groups: Any = saved.get("param_groups")
        is_state = isinstance(slots, dict) and all(isinstance(slot, dict) for slot in slots.values())
        is_list = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
        if not (is_state and is_list and groups and all(isinstance(group.get("params"), list) for group in groups)):
            fact = f"{self._path} is not the state_dict of a torch optimizer (`state` and `param_groups`)"
            raise CheckpointError(fact, fix=KNOWN_STEPS)
        slots, groups = _of_bitsandbytes(self._path, slots, groups)
        if not all(isinstance(name, str) for group in groups for name in group["params"]):
            return SavedOptimizer(self._path, slots, groups)
        named = [group | {"params": [model_name(name) for name in group["params"]]} for group in groups]
        return by_name(named, {model_name(str(name)): slot for name, slot in slots.items()}, self._path)

    def step(self) -> int | None:
        """Is in another file."""
        return None

    def max_grad_norm(self) -> float | None:
        """Is in another file."""
        return None


class WeightsFile:
    """A model's state dict in one file, as FSDP gathers it into `pytorch_model_fsdp.bin`.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def weights(self) -> Mapping[str, Scattered]:
        """By name."""
        found = plain_dict(read_archive(self._path))
        return {
            model_name(str(name)): in_one_piece(tensor)
            for name, tensor in found.items()
            if isinstance(tensor, StoredTensor) and tensor.dtype.is_floating_point
        }

    def optimizer(self) -> SavedOptimizer:
        """There is none in it."""
        raise CheckpointError(f"{self._path} has no optimizer", fix=SAVE_AGAIN)

    def step(self) -> int | None:
        """Is in another file."""
        return None

    def max_grad_norm(self) -> float | None:
        """Is in another file."""
        return None


class SafetensorsFile:
    """Weights in safetensors without a configuration beside them, as accelerate's `save_state` leaves them.

    Args:
        path: `model.safetensors`, or its index; the shards lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self._directory = path.parent

    def weights(self) -> Mapping[str, Scattered]:
        """By name, where the headers say that they lie."""
        stored_tensors(self._directory)  # refuses what is damaged or incomplete
        found: dict[str, Scattered] = {}
        for file in sorted(self._directory.glob("model*.safetensors")):
            content = map_file(file)
            first = 8 + int.from_bytes(bytes(content[:8].tolist()), "little")
            for name, entry in json.loads(bytes(content[8:first].tolist())).items():
                dtype = _DTYPES.get(entry.get("dtype")) if name != "__metadata__" else None
                if dtype is not None:
                    begins, ends = entry["data_offsets"]
                    shape = tuple(entry["shape"])
                    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
                    stored = StoredTensor(content[first + begins : first + ends], dtype, shape, strides, 0)
                    found[model_name(name)] = in_one_piece(stored)
        return found

    def optimizer(self) -> SavedOptimizer:
        """There is none in it."""
        raise CheckpointError(f"{self._directory} has no optimizer", fix=SAVE_AGAIN)

    def step(self) -> int | None:
        """Is in another file."""
        return None

    def max_grad_norm(self) -> float | None:
        """Is in another file."""
        return None


def _load(path: Path) -> Any:
    """Tensors, numbers and lists of them, without running code from the file."""
    if not _is_archive(path):
        raise CheckpointError(
            f"{path} is not a complete archive of torch.save, and was not read",
            cause="the save or the copy was interrupted, or it is a bare pickle",
            fix=SAVE_AGAIN,
        )
    if (order := _byte_order(path)) != sys.byteorder:
        fact = f"{path} was saved by a machine that is {order}-endian"
        raise CheckpointError(fact, fix="load it there and save it again from one like this")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own message is not repeated: it recommends to switch the safety off
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code and code[1].startswith("torchao.optim."):
            return plain_state(path, read_archive(path))
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and numbers ({code[1]}), and was not executed",
                cause="an optimizer that saves its own classes, or code from an untrusted source",
                fix=KNOWN_STEPS,
            ) from error
        fact = f"{path} cannot be read as tensors and numbers ({type(error).__name__})"
        raise shortage(error) or CheckpointError(fact, cause="a damaged file", fix=SAVE_AGAIN) from error


def _is_archive(path: Path) -> bool:
    """Whether a file is a whole archive; `is_zipfile` takes one that cannot be opened for none."""
    try:
        with require_readable(path).open("rb") as file:
            return zipfile.is_zipfile(file)
    except OSError as error:
        refused = CheckpointError(f"{path} cannot be read: {one_line(error)}", fix=SAVE_AGAIN)
        raise shortage(error) or refused from error


def _byte_order(path: Path) -> str:
    """Of the tensors in an archive of torch.save: bytes that torch has to turn round are not those of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith("/byteorder")]
            return archive.read(found[0]).decode() if found else "little"
    except (zipfile.BadZipFile, OSError, ValueError):
        return sys.byteorder  # what is wrong is said by whoever reads the tensors


def _of_bitsandbytes(
    path: Path, slots: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]
) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """The same with an AdamW of bitsandbytes as torch's: its states are the two moments, in codes or in float32.

    An optimizer with one state says its kind by its groups alone: without ε, betas of a Lion, or (momentum, dampening).

    The quantised states lie in a dictionary of their own since 0.49.2, and directly in the slot before. An AdEMAMix
    has two first moments in `state1`, and a mixing coefficient `alpha`; a LAMB has the norm of the update.
    """
    inner = {index: slot | plain_dict(slot.get(_QUANTISED)) for index, slot in slots.items()}
    if not inner or not all("state1" in slot for slot in inner.values()):
        return slots, groups
    two_states = all("state2" in slot for slot in inner.values())
    said = {OF_BITSANDBYTES: True}
    if two_states:
        converted_groups = [{"amsgrad": False, **group, **said} for group in groups]
    else:
        converted_groups = [of | said for of in map(_with_one_state, groups) if of]
    mixed = any("unorm_vec" in slot or ("state2" in slot) != two_states for slot in inner.values())
    if mixed or len(converted_groups) != len(groups) or any(group.get("alpha") for group in groups):
        raise CheckpointError(
            f"{path} is the state of an optimizer of bitsandbytes that is not Adam, AdamW, Lion or SGD",
            cause="LAMB, LARS, AdEMAMix, RMSprop or Adagrad of bitsandbytes",
            fix="probe a checkpoint that was trained with its AdamW, Lion or SGD, or with torch's",
        )
    converted: dict[Any, dict[str, Any]] = {}
    for index, slot in inner.items():
        try:
            first = "momentum_buffer" if "momentum" in converted_groups[0] else "exp_avg"
            keys = (first, "exp_avg_sq") if two_states else (first,)
            moments = {key: _moment(slot, place) for place, key in enumerate(keys, 1)}
        except ValueError as error:
            raise CheckpointError(f"{path}: the codes of slot {index}: {error}", fix=SAVE_AGAIN) from error
        converted[index] = moments if first == "momentum_buffer" else {"step": slot.get("step"), **moments}
    return converted, converted_groups


def _with_one_state(group: dict[str, Any]) -> dict[str, Any]:
    """The group of a Lion or of SGD as lion-pytorch and torch write it; empty for any other optimizer."""
    betas = group.get("betas")
    if group.get("eps") != 0 or not isinstance(betas, list | tuple) or len(betas) != 2:
        return {}
    rest = {key: value for key, value in group.items() if key not in ("betas", "eps", "alpha")}
    if betas[1]:
        return rest | {"betas": betas}
    return rest | {"momentum": betas[0], "dampening": 0.0, "nesterov": False}


def _moment(slot: dict[str, Any], place: int) -> Any:
    state, qmap, absmax = (slot.get(f"{name}{place}") for name in ("state", "qmap", "absmax"))
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        return state
    if not isinstance(qmap, Tensor) or not isinstance(absmax, Tensor):
        raise ValueError("they have no values or no scales")
    return Quantised(state, qmap, absmax)
