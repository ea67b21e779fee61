"""What every layout of a trainer's state answers, whoever saved it.

A layout opens a place (a file, or a folder with shards) and says what is there, by the parameters' names where it has
them. Nothing of the size of the model is read before a block of a tensor is asked for, and nothing pickled is executed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from entropy_core.checkpoints.pieces import Scattered
from entropy_core.checkpoints.stored_tensors import StoredTensor
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


class SavedOptimizer(NamedTuple):
    """What an optimizer's state dict holds, by the optimizer's own numbering or by names.

    Attributes:
        path: where it lies.
        slots: number or name of a parameter → its state.
        groups: hyperparameters, the group's parameters as `params`, and their names as `param_names` where known.
    """

    path: Path
    slots: dict[Any, dict[str, Any]]
    groups: list[dict[str, Any]]


class SavedState(Protocol):
    """The state that one trainer saved in one place."""

    def weights(self) -> Mapping[str, Scattered]:
        """The weights by the model's names, each read when it is used; none where the place holds none."""

    def optimizer(self) -> SavedOptimizer:
        """The optimizer's state; its moments are tensors, or are read as `pieces` has it."""

    def step(self) -> int | None:
        """The trainer's step; None where nothing says it."""

    def max_grad_norm(self) -> float | None:
        """The norm that the gradient is clipped at, 0 for none; None where nothing says it."""


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Say that files are damaged where what they hold is not of the kinds that it should be."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise damaged(path, f"its content is not what it should be ({type(error).__name__})") from error


def model_name(name: str) -> str:
    """A parameter's name without what wrappers of modules add to it, within and in front."""
    return _WRAPPERS.sub("", name).removeprefix("module.")


def by_name(groups: list[dict[str, Any]], slots: Mapping[str, dict[str, Any]], path: Path) -> SavedOptimizer:
    """An optimizer whose groups list their parameters by name."""
    named = [group | {"param_names": list(group["params"])} for group in groups]
    return SavedOptimizer(path, dict(slots), named)


def number(value: Any) -> Any:
    """A tensor of one number, such as a count of steps, as a number; anything else as it is."""
    return value.flat(0, 1).item() if isinstance(value, StoredTensor | Scattered) and value.numel() == 1 else value


def damaged(path: Path, fact: str, cause: str = "") -> CheckpointError:
    """The error of a place whose files do not fit together."""
    usual = "files of two saves are mixed, or the save was interrupted"
    return CheckpointError(f"{path}: {fact}", cause=cause or usual, fix=SAVE_AGAIN)
