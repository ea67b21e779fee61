"""torch's distributed checkpoints (DCP): `.metadata` and `__R_K.distcp`.

So save accelerate under FSDP with a sharded state dict, NeMo-RL, prime-rl and torchtitan, under different prefixes.
`.metadata` is a pickle that says, for every tensor, which boxes of it lie at which bytes of which file. It is read
inertly, and each box is an archive of torch.save in a window of its file.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.archives import map_file, read_archive, read_state_pickle
from entropy_core.checkpoints.content import is_file_name
from entropy_core.checkpoints.inert_pickle import Inert
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, by_name, damaged, model_name, number
from entropy_core.checkpoints.pieces import Piece, Scattered
from entropy_core.checkpoints.stored_tensors import StoredTensor, fields, integers, plain_dict

METADATA = ".metadata"
_OPTIMIZERS = ("optimizer", "optimizers", "optim")


class _Place(NamedTuple):
    """Where a box or a value lies."""

    file: Path
    offset: int
    length: int


class DistributedCheckpoint:
    """A folder with `.metadata`.

    Args:
        directory: of `.metadata` and of the files that it names.

    Raises:
        CheckpointError: `.metadata` is damaged, or names a file that is not beside it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / METADATA
        said = fields(read_state_pickle(self._path))
        tensors, places = said.get("state_dict_metadata"), said.get("storage_data")
        if not isinstance(tensors, dict) or not isinstance(places, dict):
            raise damaged(self._path, "it is no metadata of a distributed checkpoint", "it is something else")
        self._entries = {name: entry for name, entry in tensors.items() if isinstance(name, str)}
        self._paths = plain_dict(said.get("planner_data"))
        self._places = dict(self._located(places))
        self._maps: dict[Path, Tensor] = {}

    def weights(self) -> Mapping[str, Scattered]:
        """Every tensor that is not the optimizer's, under the last part of its path."""
        found = {}
        for name, entry in self._entries.items():
            if _of_optimizer(name) is None and _is_tensor(entry):
                tensor = self._tensor(name)
                if tensor.is_floating_point():
                    found[model_name(self._last(name))] = tensor
        return found

    def optimizer(self) -> SavedOptimizer:
        """Slots by `…state.<name>.<slot>`; groups by `…param_groups.<number or name>.<key>`."""
        slots: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, entry in self._entries.items():
            inside = _of_optimizer(name)
            if inside is None:
                continue
            kind, of_what, key = inside
            value = self._tensor(name) if _is_tensor(entry) else self._value(name)
            into = slots.setdefault(model_name(of_what), {}) if kind == "state" else groups.setdefault(of_what, {})
            into[key] = number(value) if kind == "param_groups" or key == "step" else value
        if not slots or not groups:
            raise damaged(self._path, "it has no optimizer", "only the weights were saved, or under other names")
        for of_what, group in groups.items():
            listed = group.get("params", [of_what])  # torchtitan has a group for each parameter, under its name
            group["params"] = [model_name(str(one)) for one in listed] if isinstance(listed, list) else []
        return by_name(list(groups.values()), slots, self._directory)

    def step(self) -> int | None:
        """The trainer's, where it saved it among its progress."""
        for name, entry in self._entries.items():
            if re.search(r"(^|\.)progress\.(global_)?step$", name) and not _is_tensor(entry):
                value = self._value(name)
                return value if type(value) is int else None
        return None

    def max_grad_norm(self) -> float | None:
        """Is not in these files."""
        return None

    def _last(self, name: str) -> str:
        """The last part of an entry's path in the state dict that was saved, which is the model's own name."""
        path = self._paths.get(name)
        return str(path[-1]) if isinstance(path, list) and path else name

    def _located(self, places: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Place]]:
        for index, info in places.items():
            said, where = fields(index), fields(info)
            begins = said.get("offset")
            offset, length, file = where.get("offset"), where.get("length"), where.get("relative_path")
            if not isinstance(said.get("fqn"), str) or type(offset) is not int or type(length) is not int:
                raise damaged(self._path, "it does not say where a tensor lies")
            if not is_file_name(file):
                raise damaged(self._path, f"it names a file that is not beside it: {file!r:.80}", "it was edited")
            if where.get("transform_descriptors"):
                raise damaged(self._path, "its tensors are compressed", "an extension of the trainer's")
            yield (said["fqn"], integers(begins) or ()), _Place(self._directory / file, offset, length)

    def _tensor(self, name: str) -> Scattered:
        """One tensor of the metadata; its boxes are opened when they are read."""
        said = fields(self._entries[name])
        shape, dtype = integers(said.get("size")), _dtype(said.get("properties"))
        chunks = said.get("chunks")
        if shape is None or dtype is None or not isinstance(chunks, list):
            raise damaged(self._path, f"{name} has no shape or no numbers that can be read")
        pieces = []
        for chunk in chunks:
            begins, sizes = integers(fields(chunk).get("offsets")), integers(fields(chunk).get("sizes"))
            place = self._places.get((name, begins or ()))
            if begins is None or sizes is None or len(begins) != len(shape) or place is None:
                raise damaged(self._path, f"a part of {name} lies nowhere")
            pieces.append(Piece(begins, sizes, cache(partial(self._open, place, sizes, dtype))))
        try:
            return Scattered(shape, dtype, pieces)
        except ValueError as error:
            raise damaged(self._path, f"{name}: {error}") from error

    def _open(self, place: _Place, sizes: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        found = self._read(place)
        if not isinstance(found, StoredTensor) or found.shape != sizes or found.dtype != dtype:
            raise damaged(place.file, f"byte {place.offset} holds something else than {METADATA} says")
        return found

    def _value(self, name: str) -> Any:
        place = self._places.get((name, ()))
        if place is None:
            raise damaged(self._path, f"{name} lies nowhere")
        return self._read(place)

    def _read(self, place: _Place) -> Any:
        if place.file not in self._maps:  # one map of a file, however many tensors lie in it
            self._maps[place.file] = map_file(place.file)
        return read_archive(*place, self._maps[place.file])


def _of_optimizer(name: str) -> tuple[str, str, str] | None:
    """`state` or `param_groups`, of what, and which key, for an entry of the optimizer's; None for any other."""
    for kind in ("state", "param_groups"):
        head, _, rest = name.partition(f".{kind}.")
        if rest and head.rpartition(".")[2] in _OPTIMIZERS:
            of_what, _, key = rest.rpartition(".")
            return kind, of_what, key
    return None


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, Inert) and entry.name.rpartition(".")[2] == "TensorStorageMetadata"


def _dtype(properties: Any) -> torch.dtype | None:
    """The dtype among a tensor's properties: the first of them, or under its name."""
    state = properties.state if isinstance(properties, Inert) else None
    said = state[0] if isinstance(state, list) and state else plain_dict(state).get("dtype")
    found = getattr(torch, said.name.removeprefix("torch."), None) if isinstance(said, Inert) else None
    return found if isinstance(found, torch.dtype) else None
