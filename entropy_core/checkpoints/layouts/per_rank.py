"""verl's and SkyRL's files of every rank: `model_world_size_W_rank_R.pt` and `optim_world_size_W_rank_R.pt`.

FSDP2 saves DTensors, and an optimizer that numbers its parameters in the order of `model.parameters()`. FSDP1 (with
`use_orig_params` off) numbers its units instead: the root first, then the layers. A unit's parameters lie one behind
the other in a flat one, which is padded and cut into one part a rank; names and shapes are those of the model's file.
With LoRA every factor is a unit of its own, behind that of its layer, and the others have no slots.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, by_name, damaged, model_name, number
from entropy_core.checkpoints.pieces import Piece, Scattered, in_one_piece
from entropy_core.checkpoints.stored_tensors import ShardOfTensor, StoredTensor, plain_dict

RANKS = re.compile(r"(model|optim)_world_size_(\d+)_rank_(\d+)\.pt")
_LAYER = re.compile(r"^(.*?\.\d+)\.")
_FACTOR = re.compile(r"(.*\.lora_[AB]\.\w+)\.weight")

OfRanks = Mapping[int, Any]


class PerRank:
    """A folder with one file of weights, and one of the optimizer, for every rank.

    Args:
        directory: of these files.

    Raises:
        CheckpointError: a rank is missing, or the files are of runs with different numbers of ranks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        found = [match for match in map(RANKS.fullmatch, sorted(path.name for path in directory.iterdir())) if match]
        worlds = sorted({int(match[2]) for match in found})
        if len(worlds) != 1:
            sizes = " and ".join(map(str, worlds)) or "no"
            raise damaged(directory, f"it holds files of {sizes} ranks", "two runs saved into one folder")
        self._world = worlds[0]
        self._files = {
            kind: {int(match[3]): directory / match[0] for match in found if match[1] == kind}
            for kind in ("model", "optim")
        }
        for kind, files in self._files.items():
            if files and sorted(files) != list(range(self._world)):
                missing = [rank for rank in range(self._world) if rank not in files]
                raise damaged(directory, f"of {self._world} ranks, the {kind} files of {missing} are missing")

    def weights(self) -> Mapping[str, Scattered]:
        """By name, in the order of the state dict."""
        return {name: tensor for name, tensor in self._weights.items() if tensor.is_floating_point()}

    def optimizer(self) -> SavedOptimizer:
        """Numbered as the model's parameters are; by name where the numbers are those of FSDP1's units."""
        ranks = [plain_dict(read_archive(path)) for _, path in sorted(self._files["optim"].items())]
        if not ranks:
            raise damaged(self._directory, "there is no optim_world_size_* in it", "the optimizer was not saved")
        states = [plain_dict(rank.get("state")) for rank in ranks]
        groups = ranks[0].get("param_groups")
        if not isinstance(groups, list) or any(state.keys() != states[0].keys() for state in states):
            raise damaged(self._directory, "the optimizer's files of two ranks hold different parameters")
        groups = [{key: number(value) for key, value in plain_dict(group).items()} for group in groups]
        if any(_is_flat(value) for slot in states[0].values() for value in plain_dict(slot).values()):
            return self._of_units(groups, states)
        slots = {}
        for index, slot in states[0].items():
            slots[index] = {
                key: self._joined(str(index), [plain_dict(state[index]).get(key) for state in states], key)
                for key in plain_dict(slot)
            }
        return SavedOptimizer(self._directory, slots, groups)

    def step(self) -> int | None:
        """Is in the name of the folder above."""
        return None

    def max_grad_norm(self) -> float | None:
        """Is not in these files."""
        return None

    @cached_property
    def _weights(self) -> dict[str, Scattered]:
        ranks = [plain_dict(read_archive(path)) for _, path in sorted(self._files["model"].items())]
        if not ranks:
            raise damaged(self._directory, "there is no model_world_size_* in it", "the weights were not saved")
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise damaged(self._directory, "the model's files of two ranks hold different parameters")
        found = {name: self._joined(str(name), [rank[name] for rank in ranks], "") for name in ranks[0]}
        return {model_name(str(name)): tensor for name, tensor in found.items() if isinstance(tensor, Scattered)}

    def _joined(self, name: str, parts: Sequence[Any], key: str) -> Any:
        """One tensor of what each rank has of it; a number, or what every rank has whole, is that of rank 0."""
        first = parts[0]
        if key == "step" or not isinstance(first, ShardOfTensor | StoredTensor):
            return number(first)
        if isinstance(first, StoredTensor):
            return in_one_piece(first)
        pieces = []
        for rank, part in enumerate(parts):
            if not isinstance(part, ShardOfTensor) or part.shape != first.shape or part.axis != first.axis:
                raise damaged(self._directory, f"rank {rank} has another {key or 'weight'} of {name} than rank 0")
            if part.axis is None and part.offsets is None and rank:
                break  # whole on every rank
            pieces += _of_rank(part, rank, self._world)
        dtype = next((local.dtype for part in parts for local in part.pieces), None)
        try:
            if dtype is None:
                raise ValueError("no rank has any of it")
            return Scattered(first.shape, dtype, pieces)
        except ValueError as error:
            raise damaged(self._directory, f"{key or 'the weight'} of {name}: {error}") from error

    def _of_units(self, groups: list[dict[str, Any]], states: Sequence[dict[Any, Any]]) -> SavedOptimizer:
        """Slots by name, cut out of the flat ones of FSDP1's units."""
        units = self._units(states)
        slots: dict[str, dict[str, Any]] = {}
        members = [index for group in groups for index in group.get("params", [])]
        if members != list(range(len(units))) or not states[0].keys() <= set(members):
            raise damaged(
                self._directory,
                f"the optimizer has {len(members)} flat parameters, and the model's layers give {len(units)}",
                "a wrapping policy of FSDP1 that is not one unit a layer",
            )
        for index, unit in enumerate(units):
            if index not in states[0]:  # frozen
                continue
            size = sum(math.prod(shape) for shape in unit.values())
            parts = [plain_dict(state[index]) for state in states]
            length = -(-size // self._world)
            for key, value in parts[0].items():
                if not _is_flat(value):
                    for name in unit:
                        slots.setdefault(name, {})[key] = number(value)
                    continue
                if any(not _is_flat(part.get(key)) or part[key].numel() != length for part in parts):
                    raise damaged(
                        self._directory,
                        f"{key} of unit {index} has parts of {value.numel()} numbers, and {len(unit)} parameters with "
                        f"{size} numbers give parts of {length}",
                        "a wrapping policy of FSDP1 that is not one unit a layer",
                    )
                start = 0
                for name, shape in unit.items():
                    flat = _interval([part[key] for part in parts], start, math.prod(shape))
                    slots.setdefault(name, {})[key] = Scattered(shape, value.dtype, flat)
                    start += math.prod(shape)
        named = [group | {"params": [name for index in group["params"] for name in units[index]]} for group in groups]
        return by_name(named, slots, self._directory)

    def _units(self, states: Sequence[dict[Any, Any]]) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of each unit: the root's first, then each layer's and those of its LoRA factors."""
        root: dict[str, tuple[int, ...]] = {}
        units = {"": root}
        for name, tensor in self.weights().items():
            layer = _FACTOR.match(name) or _LAYER.match(name)
            units.setdefault(layer[1] if layer else "", {})[name] = tensor.shape
        head = next((name for name in root if name.endswith("lm_head.weight")), "")
        if head and self._is_tied(root, head, states):  # one parameter with the embedding, and once in the flat one
            del root[head]
        return list(units.values())

    def _is_tied(self, root: Mapping[str, tuple[int, ...]], head: str, states: Sequence[dict[Any, Any]]) -> bool:
        """As the model's configuration has it; without one, whether the flat parameter is as long as without a head."""
        config = self._directory / "huggingface" / "config.json"
        if config.exists():
            return read_json(config).get("tie_word_embeddings") is True
        flat = next(filter(_is_flat, plain_dict(states[0].get(0)).values()), None)
        size = sum(math.prod(shape) for name, shape in root.items() if name != head)
        return flat is not None and flat.numel() == -(-size // self._world)


def _of_rank(part: ShardOfTensor, rank: int, world: int) -> list[Piece]:
    """What a rank holds, by where it lies in the whole."""
    if part.offsets is not None:
        where = list(part.offsets)
    elif part.axis is None:
        where = [(0,) * len(part.shape)]
    else:
        chunk = -(-part.shape[part.axis] // world)
        begins = [0] * len(part.shape)
        begins[part.axis] = min(rank * chunk, part.shape[part.axis])
        where = [tuple(begins)]
    return [
        Piece(begins, local.shape, partial(_itself, local)) for begins, local in zip(where, part.pieces, strict=True)
    ]


def _interval(parts: Sequence[StoredTensor], start: int, size: int) -> list[Piece]:
    """The pieces of an interval of a flat parameter that is cut into equal parts, by the interval's own numbers."""
    pieces, length, begins = [], parts[0].numel(), 0
    while begins < size:
        rank, offset = divmod(start + begins, length)
        taken = min(size - begins, length - offset)
        local = parts[rank]
        cut = local._replace(shape=(taken,), strides=(1,), offset=local.offset + offset)
        pieces.append(Piece((begins,), (taken,), partial(_itself, cut)))
        begins += taken
    return pieces


def _itself(tensor: StoredTensor) -> StoredTensor:
    return tensor


def _is_flat(value: Any) -> bool:
    return isinstance(value, StoredTensor) and len(value.shape) == 1
