"""What DeepSpeed writes beside the optimizer's states: `[zero_pp_rank_R_]mp_rank_00_model_states.pt`.

The folders of ZeRO and the universal ones that are made of them have these files.
"""

import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.layouts.interface import damaged, model_name, number
from entropy_core.checkpoints.pieces import Piece, Scattered, in_one_piece
from entropy_core.checkpoints.stored_tensors import StoredTensor, integers, plain_dict
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_NO_OTHER_RULE = f"probe a run whose optimizer is torch's AdamW; {SAVE_AGAIN}"


class ModelStates:
    """The model states of every rank.

    Args:
        directory: of the files.

    Raises:
        CheckpointError: there are none of rank 0, or the model is parallel in another way.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        names = sorted(path.name for path in directory.iterdir())
        found = [match for match in map(_MODEL_STATES.fullmatch, names) if match]
        require_no_model_parallelism(directory, (int(match[2]) for match in found))
        if not found:
            raise damaged(directory, "there is no *_model_states.pt in it", "the save or the copy was interrupted")
        self._models = {int(match[1] or 0): plain_dict(read_archive(directory / match[0])) for match in found}
        if 0 not in self._models:
            raise damaged(directory, "the model states of rank 0 are missing")

    @property
    def step(self) -> int | None:
        """The engine's count of optimizer steps."""
        steps = self._models[0].get("global_steps")
        return steps if type(steps) is int else None

    @property
    def config(self) -> dict[Any, Any]:
        """DeepSpeed's own configuration; empty where older versions do not save it here."""
        return plain_dict(self._models[0].get("ds_config"))

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        said = self._models[0].get("param_shapes")
        found = []
        for group in said if isinstance(said, list) else []:
            shapes = {str(name): integers(size) for name, size in plain_dict(group).items()}
            if None in shapes.values():
                break
            found.append({name: shape for name, shape in shapes.items() if shape is not None})
        return found

    def shapes(self, groups: list[dict[Any, Any]]) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the trained parameters, by the names that DeepSpeed has, for every flat tensor in its order.

        Stage 3 cuts a group into several flat tensors if it is large; the others have one for each.

        Args:
            groups: of the optimizer within DeepSpeed's, whose parameters are the flat tensors, by number.

        Raises:
            CheckpointError: there is another number of flat tensors.
        """
        flat = [number for group in groups for number in group.get("params") or ()]
        if flat != list(range(len(self._shapes))):
            raise damaged(self._directory, "the model states do not name the parameters of each group")
        return self._shapes

    def complete(self, trained: dict[str, Scattered], in_parts: bool) -> dict[str, Scattered]:
        """All weights, by the model's names.

        Args:
            trained: the float32 weights of what is trained.
            in_parts: whether every rank has a part of what is not trained, as under stage 3.

        Returns:
            These, whatever else the model states hold in its dtype, and the other names of shared weights.
        """
        found = dict(trained)
        for name, tensor in plain_dict(self._models[0].get("module")).items():
            if isinstance(tensor, StoredTensor) and tensor.dtype.is_floating_point and tensor.numel():
                found.setdefault(model_name(str(name)), in_one_piece(tensor))
        if in_parts:
            found |= self._frozen()
        for alias, name in plain_dict(self._models[0].get("shared_params")).items():
            if model_name(str(name)) in found:
                found.setdefault(model_name(str(alias)), found[model_name(str(name))])
        return found

    def _frozen(self) -> dict[str, Scattered]:
        shapes = plain_dict(self._models[0].get("frozen_param_shapes"))
        found = {}
        for raw, size in shapes.items():
            shape, dtype = integers(size), torch.float32
            pieces: list[Piece] = []
            for rank, model in sorted(self._models.items()):
                part = plain_dict(model.get("frozen_param_fragments")).get(raw)
                if shape is not None and isinstance(part, StoredTensor):
                    begins = min(part.numel() * rank, math.prod(shape))
                    taken = min(part.numel(), math.prod(shape) - begins)
                    cut = part._replace(shape=(taken,), strides=(1,))
                    pieces.append(Piece((begins,), (taken,), partial(_itself, cut)))
                    dtype = part.dtype
            if shape is not None and pieces:
                try:
                    found[model_name(str(raw))] = Scattered(shape, dtype, pieces)
                except ValueError as error:
                    raise damaged(self._directory, f"{raw}: {error}") from error
        return found


def require_no_model_parallelism(directory: Path, ranks: Iterable[int]) -> None:
    """Refuse the states of model-parallel ranks, which hold parts of parameters that no file describes."""
    if any(ranks):
        raise CheckpointError(
            f"{directory} holds the states of several model-parallel ranks",
            cause="training with tensor or pipeline parallelism, which is not read",
            fix="convert it with DeepSpeed's ds_to_universal.py and zero_to_fp32.py, and probe it as `fresh`",
        )


def engine_groups(
    groups: list[dict[Any, Any]], names: Sequence[Iterable[str]], config: dict[Any, Any], directory: Path
) -> list[dict[str, Any]]:
    """The groups of the optimizer within DeepSpeed's, with names; that of an Adam without decoupled decay says so.

    Args:
        groups: as they are saved; their parameters are the flat tensors, by number.
        names: of the parameters in each flat tensor.
        config: of DeepSpeed.
        directory: for errors.

    Raises:
        CheckpointError: an Adam makes its steps without bias correction.
    """
    of_optimizer = plain_dict(plain_dict(config.get("optimizer")).get("params"))
    found = []
    for of_group in groups:
        members = [model_name(name) for flat in of_group["params"] for name in names[flat]]
        plain = {str(key): number(value) for key, value in of_group.items() if key != "params"}
        if plain.get("bias_correction", True) is not True:
            raise CheckpointError(f"{directory} has an Adam without bias correction", fix=_NO_OTHER_RULE)
        if "decoupled_weight_decay" not in plain and of_optimizer.get("adam_w_mode", True) is False:
            plain["decoupled_weight_decay"] = False
        # FusedAdam and DeepSpeedCPUAdam have no amsgrad, and their groups do not say so
        found.append({"amsgrad": False, **plain, "params": members})
    return found


def clipping(config: dict[Any, Any]) -> float | None:
    """The norm that a configuration of DeepSpeed clips at, 0 for none; None where it says something else."""
    said = config.get("gradient_clipping", 0.0)
    return float(said) if type(said) in (int, float) else None


def stage_of(said: Any) -> int:
    """The stage of ZeRO, as a number or as DeepSpeed's enumeration; 0 for anything else."""
    arguments = getattr(said, "arguments", None)
    stage = arguments[0] if isinstance(arguments, list) and len(arguments) == 1 else said
    return stage if type(stage) is int else 0


def _itself(tensor: StoredTensor) -> StoredTensor:
    return tensor
