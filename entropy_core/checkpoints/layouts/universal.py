"""DeepSpeed's universal checkpoints: `zero/<parameter>/fp32.pt`, `exp_avg.pt` and `exp_avg_sq.pt`, each of them whole.

`ds_to_universal.py` makes them of the folders of ZeRO, whose model states it copies. Of stages 1 and 2 every file is a
dictionary with the tensor in its shape; of stage 3 it is the flat tensor alone. `zero/optimizer_state.pt` has the
groups.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.content import is_file_name
from entropy_core.checkpoints.layouts.deepspeed_model import ModelStates, clipping, engine_groups, stage_of
from entropy_core.checkpoints.layouts.interface import SavedOptimizer, by_name, damaged, model_name, number
from entropy_core.checkpoints.pieces import Piece, Scattered
from entropy_core.checkpoints.stored_tensors import StoredTensor, plain_dict

GROUPS = "zero/optimizer_state.pt"
_WEIGHT = "fp32"
_KEYS = (_WEIGHT, "exp_avg", "exp_avg_sq")


class Universal:
    """A folder `global_stepN_universal`.

    Args:
        directory: of `zero/` and of the model states.

    Raises:
        CheckpointError: a file is missing or damaged, or the model was parallel in another way.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model = ModelStates(directory)
        self._state = plain_dict(read_archive(directory / GROUPS))
        groups = self._state.get("param_groups")
        if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
            raise damaged(directory / GROUPS, "its optimizer has no param groups", "an old version of DeepSpeed")
        self._groups = groups

    def weights(self) -> Mapping[str, Scattered]:
        """The float32 weights of what is trained; whatever else the model states hold, in their dtype."""
        found = {name: tensors[_WEIGHT] for name, tensors in self._tensors.items() if _WEIGHT in tensors}
        return self._model.complete(found, stage_of(self._state.get("zero_stage")) == 3)

    def optimizer(self) -> SavedOptimizer:
        """Moments and groups; a parameter that never had a gradient has no slot."""
        names = self._model.shapes(self._groups)
        slots = {
            name: {"step": self._steps[name]} | {key: of for key, of in tensors.items() if key != _WEIGHT}
            for name, tensors in self._tensors.items()
            if tensors.keys() - {_WEIGHT}
        }
        return by_name(engine_groups(self._groups, names, self._model.config, self._directory), slots, self._directory)

    def step(self) -> int | None:
        """The engine's count of optimizer steps."""
        return self._model.step

    def max_grad_norm(self) -> float | None:
        """As DeepSpeed's own configuration has it, which is what clips."""
        return clipping(self._model.config)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, tuple[int, ...], int]]:
        """Folder, shape and number of the flat tensor of every parameter."""
        found = {}
        for flat, shapes in enumerate(self._model.shapes(self._groups)):
            for name, shape in shapes.items():
                folder = self._directory / "zero" / name
                if not is_file_name(name) or not folder.is_dir():
                    raise damaged(self._directory, f"there is no folder of {name!r:.80} in zero/")
                found[model_name(name)] = folder, shape, flat
        return found

    @cached_property
    def _tensors(self) -> dict[str, dict[str, Scattered]]:
        """The tensors of every parameter, each opened when it is read."""
        return {name: dict(self._of(folder, shape)) for name, (folder, shape, _) in self._places.items()}

    def _of(self, folder: Path, shape: tuple[int, ...]) -> Iterator[tuple[str, Scattered]]:
        has = {path.name for path in folder.iterdir()}
        for key in _KEYS:
            if f"{key}.pt" in has:
                piece = Piece((0,), (math.prod(shape),), cache(partial(_open, folder / f"{key}.pt", shape)))
                yield key, Scattered(shape, torch.float32, [piece])
            elif key == _WEIGHT:
                raise damaged(folder, f"there is no {key}.pt in it", "the conversion or the copy was interrupted")

    @cached_property
    def _steps(self) -> dict[str, Any]:
        """Of every parameter: in its folder, else in what stage 3 has of its flat tensor, else the engine's."""
        inner = plain_dict(plain_dict(self._state.get("optimizer_state_dict")).get("state"))
        in_folders = {name: folder / "step.pt" for name, (folder, _, _) in self._places.items()}
        return {
            name: number(
                read_archive(in_folders[name])
                if in_folders[name].exists()
                else plain_dict(inner.get(flat)).get("step", self.step())
            )
            for name, (_, _, flat) in self._places.items()
        }


def _open(path: Path, shape: tuple[int, ...]) -> StoredTensor:
    """The tensor in a file, flat."""
    saved = read_archive(path)
    found = saved if isinstance(saved, StoredTensor) else plain_dict(saved).get("param")
    size = math.prod(shape)
    if not isinstance(found, StoredTensor) or found.dtype != torch.float32 or found.shape not in (shape, (size,)):
        raise damaged(path, f"it holds something else than {size} numbers in float32", "it belongs to another model")
    if found.flat_in_file():
        return found._replace(shape=(size,), strides=(1,))
    raise damaged(path, "its numbers are in another order than the parameter's", "it was edited")
