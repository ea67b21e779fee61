"""DeepSpeed's ZeRO: `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` of every rank, and the model states.

Stages 1 and 2 lay all parameters of a group one behind the other and cut that into one partition a rank; each rank
says what of which parameter its partition holds. Stage 3 cuts every parameter into one part a rank, padded to equal
lengths, and lays a rank's parts one behind the other, a billion numbers or so in one tensor. Both keep float32 weights
beside the moments.
"""

import math
import re
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.layouts.deepspeed_model import (
    ModelStates,
    clipping,
    engine_groups,
    require_no_model_parallelism,
    stage_of,
)
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, by_name, damaged, model_name, number
from entropy_core.checkpoints.pieces import Piece, Scattered
from entropy_core.checkpoints.stored_tensors import StoredTensor, fields, plain_dict
from entropy_core.errors import CheckpointError

OPTIMIZER_STATES = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_WEIGHT = "float32 weight"  # beside exp_avg and exp_avg_sq, as if it were a moment

Flat = dict[int, StoredTensor]  # by rank


class DeepSpeed:
    """A folder `global_stepN`.

    Args:
        directory: of the optimizer states and of the model states.

    Raises:
        CheckpointError: a rank is missing or of another save, or the model is parallel in another way.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        names = sorted(path.name for path in directory.iterdir())
        states = [match for match in map(OPTIMIZER_STATES.fullmatch, names) if match]
        require_no_model_parallelism(directory, (int(match[2]) for match in states))
        if not states:
            raise damaged(directory, "there is no *_optim_states.pt in it", "the save or the copy was interrupted")
        self._ranks: dict[int, dict[Any, Any]] = {}
        for match in states:
            if int(match[1]) in self._ranks:
                raise damaged(directory, f"rank {match[1]} has two files of optimizer states")
            self._ranks[int(match[1])] = plain_dict(read_archive(directory / match[0]))
        self._model = ModelStates(directory)
        self._check_ranks()

    def weights(self) -> Mapping[str, Scattered]:
        """The float32 weights of what is trained; whatever else the model states hold, in their dtype."""
        return self._model.complete({name: slot[_WEIGHT] for name, slot in self._slots.items()}, self._stage == 3)

    def optimizer(self) -> SavedOptimizer:
        """Moments and groups; that of an Adam whose decay is not decoupled says so."""
        groups = engine_groups(self._groups, self._shapes, self._config, self._directory)
        slots = {
            name: {key: value for key, value in slot.items() if key != _WEIGHT} for name, slot in self._slots.items()
        }
        return by_name(groups, slots, self._directory)

    def step(self) -> int | None:
        """The engine's count of optimizer steps."""
        return self._model.step

    def max_grad_norm(self) -> float | None:
        """As DeepSpeed's own configuration has it, which is what clips."""
        return clipping(self._config)

    @cached_property
    def _config(self) -> dict[Any, Any]:
        return plain_dict(self._ranks[0].get("ds_config"))

    @cached_property
    def _stage(self) -> int:
        return stage_of(self._of(0).get("zero_stage"))

    def _of(self, rank: int) -> dict[Any, Any]:
        return plain_dict(self._ranks[rank].get("optimizer_state_dict"))

    def _inner(self, rank: int) -> dict[Any, Any]:
        """The state dict of the optimizer within ZeRO's."""
        return plain_dict(self._of(rank).get("optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"))

    def _check_ranks(self) -> None:
        if 0 not in self._ranks:
            raise damaged(self._directory, "the optimizer states of rank 0 are missing")
        if self._stage not in (1, 2, 3):
            raise CheckpointError(
                f"{self._directory} is not of DeepSpeed's ZeRO stages 1 to 3",
                cause="another stage, or a version whose files are different",
                fix="train with a ZeRO stage, or convert it to model.safetensors and optimizer.pt",
            )
        counts = {
            count
            for rank in self._ranks
            for said in [self._of(rank).get("partition_count")]
            for count in (said if isinstance(said, list) else [said])
        }
        if counts != {len(self._ranks)} or sorted(self._ranks) != list(range(len(self._ranks))):
            found, of_all = (", ".join(sorted(map(str, some))) for some in (self._ranks, counts))
            raise damaged(self._directory, f"it has the optimizer states of rank {found}, and {of_all} ranks saved")
        steps = {str(number(plain_dict(one).get("step"))) for rank in self._ranks for one in self._states(rank)}
        if len(steps) > 1:
            raise damaged(self._directory, f"its ranks are at different steps: {', '.join(sorted(steps))}")

    def _states(self, rank: int) -> list[Any]:
        return list(plain_dict(self._inner(rank).get("state")).values())

    @cached_property
    def _groups(self) -> list[dict[Any, Any]]:
        groups = self._inner(0).get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise damaged(self._directory, "its optimizer has no param groups", "an old version of DeepSpeed")
        return groups

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of every flat tensor, in its order."""
        said = self._model.shapes(self._groups)
        return [{model_name(name): shape for name, shape in group.items()} for group in said]

    @cached_property
    def _slots(self) -> dict[str, dict[str, Any]]:
        """Moments, float32 weight and step of every parameter."""
        slots: dict[str, dict[str, Any]] = {}
        for index, shapes in enumerate(self._shapes):
            cut = self._cut_in_parts if self._stage == 3 else self._cut_in_partitions
            where = cut(index, shapes)
            step = self._step_of(index)
            for key in self._keys():
                flat = self._flat(index, key)
                for name, shape in shapes.items():
                    slot = slots.setdefault(name, {"step": step})
                    slot[key] = self._scattered(name, shape, flat, where[name])
        return slots

    def _keys(self) -> list[str]:
        found = {str(key) for one in self._states(0) for key, value in plain_dict(one).items() if _is_flat(value)}
        return [*sorted(found), _WEIGHT]

    def _step_of(self, index: int) -> Any:
        """In the state of each flat tensor, or in its group."""
        of_group = next(group for group in self._groups if index in group["params"])
        return number(plain_dict(plain_dict(self._inner(0).get("state")).get(index)).get("step", of_group.get("step")))

    def _flat(self, index: int, key: str) -> Flat:
        """One of the flat tensors, on every rank."""
        found: Flat = {}
        for rank in self._ranks:
            if key == _WEIGHT:
                said = self._of(rank).get("fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups")
                of_all: Any = dict(enumerate(said)) if isinstance(said, list) else {}
            else:
                states = plain_dict(self._inner(rank).get("state"))
                of_all = {number: plain_dict(state).get(key) for number, state in states.items()}
            tensor = of_all.get(index)
            if not isinstance(tensor, StoredTensor):
                raise damaged(self._directory, f"rank {rank} has no {key} of its flat tensor {index}")
            found[rank] = tensor
        return found

    def _cut_in_partitions(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[int, ...]]]:
        """For every parameter: rank, start in the rank's partition, start in the parameter, numbers."""
        where: dict[str, list[tuple[int, ...]]] = {name: [] for name in shapes}
        done = dict.fromkeys(shapes, 0)
        for rank in sorted(self._ranks):
            said = self._of(rank).get("param_slice_mappings")
            mapping = plain_dict(said[index]) if isinstance(said, list) and index < len(said) else {}
            for raw, address in mapping.items():
                name, place = model_name(str(raw)), fields(address)
                start, size = place.get("start"), place.get("numel")
                if name not in where or type(start) is not int or type(size) is not int or min(start, size) < 0:
                    raise damaged(self._directory, f"rank {rank} holds a part of {name}, which is none of its group")
                where[name].append((rank, start, done[name], size))
                done[name] += size
        return where

    def _cut_in_parts(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[int, ...]]]:
        """The same where every parameter is cut into equal parts, the last one padded."""
        ranks, start = len(self._ranks), 0
        where: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            part = -(-size // ranks)
            ends = [min(part * rank, size) for rank in range(ranks + 1)]
            where[name] = [(rank, start, ends[rank], ends[rank + 1] - ends[rank]) for rank in range(ranks)]
            start += part
        return where

    def _scattered(self, name: str, shape: tuple[int, ...], flat: Flat, where: list[tuple[int, ...]]) -> Scattered:
        try:
            pieces = [_piece(flat[rank], *cut) for rank, *cut in where if cut[2]]
            return Scattered(shape, flat[0].dtype, pieces)
        except ValueError as error:
            raise damaged(self._directory, f"{name}: {error}") from error


def _piece(tensor: StoredTensor, start: int, begins: int, size: int) -> Piece:
    """A piece of a flat tensor, by the parameter that it is of. Raises ValueError if the tensor ends before it does."""
    if start + size > tensor.numel():
        raise ValueError("a partition ends before it does")
    part = tensor._replace(shape=(size,), strides=(1,), offset=tensor.offset + start)
    return Piece((begins,), (size,), partial(_itself, part))


def _itself(tensor: StoredTensor) -> StoredTensor:
    return tensor


def _is_flat(value: Any) -> bool:
    return isinstance(value, StoredTensor) and len(value.shape) == 1
