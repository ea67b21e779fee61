"""A device without hardware: tensors on it are held by the CPU, and say that they are on `shadow`.

Code that was written for a GPU runs on it to the last bit, data-dependent branches included, which neither torch's fake
tensors nor its meta device can do: those hold no values. What a GPU would refuse is refused: an operation on tensors of
both devices. What it would wait for is noted, with the line of the project that asked for it.

It is torch's own extension point for a further device, `PrivateUse1`. Memory is handed out by three functions below,
and every operation on a shadow tensor passes `ShadowTensor.__torch_dispatch__`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "shadow"
PACKAGE = Path(__file__).resolve().parents[1] / "entropy_core"

_aten = torch.ops.aten
_SIZED_BY_DATA = {  # a GPU has to finish before the host knows how large the result is
    "nonzero",
    "masked_select",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "bincount",
}


class Wait(NamedTuple):
    """Something that makes the host wait for a GPU: what, and the innermost line of the package that asks for it."""

    what: str
    where: str


class Seen:
    """What happened on the device."""

    def __init__(self) -> None:
        self.waits: Counter[Wait] = Counter()
        self.float64: Counter[str] = Counter()  # numbers of float64 results on the device, by line


_seen = Seen()


@contextmanager
def watched() -> Iterator[Seen]:
    """What happens on the device within the context."""
    global _seen
    before, _seen = _seen, Seen()
    try:
        yield _seen
    finally:
        _seen = before


class ShadowTensor(torch.Tensor):
    """A tensor on the shadow device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "ShadowTensor":
        """Wrap a CPU tensor, which views of the wrapper share."""
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.held = held
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ShadowTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Compute on what the arguments hold."""
        kwargs = dict(kwargs or {})
        tensors = _tensors_in((*args, *kwargs.values()))
        ours = [tensor for tensor in tensors if isinstance(tensor, cls)]
        name = func._schema.name.removeprefix("aten::")
        _refuse_strangers(name, [tensor for tensor in tensors if not isinstance(tensor, cls)])
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else NAME
        _note(name, args, to)
        if to == NAME and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*_held(args), **{key: _held(value) for key, value in kwargs.items()})
        if to != NAME:
            return result
        own = {id(tensor.held): tensor for tensor in ours}  # what an operation in place returns

        def wrapped(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(wrapped, value))
            if not isinstance(value, Tensor):
                return value
            if value.dtype == torch.float64:
                _seen.float64[_where()] += value.numel()
            return own[id(value)] if id(value) in own else cls(value)

        return wrapped(result)


def _tensors_in(value: Any) -> list[Tensor]:
    """Those of an argument, which may be a list. Torch's own trees take ten times as long as the operations."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors_in(item)] if isinstance(value, list | tuple) else []


def _held(value: Any) -> Any:
    """An argument with what the CPU holds in place of shadow tensors."""
    if isinstance(value, ShadowTensor):
        return value.held
    return type(value)(map(_held, value)) if isinstance(value, list | tuple) else value


def _refuse_strangers(name: str, strangers: list[Tensor]) -> None:
    """As a GPU does: numbers are taken from the host, tensors of one dimension or more are not."""
    if name not in ("copy_", "_to_copy") and any(tensor.dim() for tensor in strangers):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {NAME} and cpu, in {_where()}"
        )


def _note(name: str, args: tuple, to: str) -> None:
    indices = [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
    if name == "_local_scalar_dense" or to == "cpu":
        _seen.waits[Wait("read", _where())] += 1
    elif name in _SIZED_BY_DATA or any(index.dtype == torch.bool for index in indices):
        _seen.waits[Wait("size", _where())] += 1


@cache
def _ours(file: str) -> str:
    """Path of a file of the package, from the folder that the package is in; empty for a file of somebody else."""
    return str(Path(file).relative_to(PACKAGE.parent)) if PACKAGE in Path(file).parents else ""


def _where() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if file := _ours(frame.f_code.co_filename):
            return f"{file}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


class _AsOnADevice(TorchFunctionMode):
    """Three things that torch does to a tensor below the level at which `ShadowTensor` sees operations."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(NAME)
        if func is torch.Tensor.tolist and isinstance(args[0], ShadowTensor):
            return args[0].cpu().tolist()
        if func == torch.Tensor.data.__set__ and isinstance(args[0], ShadowTensor):
            args[0].held = args[1].held
            return None
        return func(*args, **kwargs)


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, *_: Any, **__: Any) -> Tensor:
    return ShadowTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return ShadowTensor(torch.empty_strided(size, stride, dtype=dtype))


def _zeros(size: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return ShadowTensor(torch.zeros(size, dtype=dtype))


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    ours, theirs = (tensor.held if isinstance(tensor, ShadowTensor) else tensor for tensor in (to, source))
    ours.copy_(theirs)
    return to


class _Module(_DummyBackendModule):
    """What torch calls `torch.shadow`. Outside of `shadow_device` there is no such device."""

    inside = 0

    def is_available(self) -> bool:
        return self.inside > 0

    def device_count(self) -> int:
        return 1 if self.inside else 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_module = _Module()
_library = torch.library.Library("aten", "IMPL")  # unregisters all when it is collected


def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, _module)
    for operator, function in {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_efficientzerotensor": _zeros,
        "copy_": _copy,
    }.items():
        _library.impl(operator, function, "PrivateUse1")


_register()


@contextmanager
def shadow_device() -> Iterator[torch.device]:
    """Within the context the device is there."""
    _module.inside += 1
    try:
        with _AsOnADevice():
            yield torch.device(NAME, 0)
    finally:
        _module.inside -= 1
