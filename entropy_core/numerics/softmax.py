"""The derivative of attention's softmax in forward mode, from the softmax itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DirectSoftmaxDerivative(TorchFunctionMode):
    """Within the context `functional.softmax` has the derivative ẏ = y·(ẋ − Σ y·ẋ) in forward mode, and no other mode.

    Torch's own takes the exponential of every score a second time, which is slow where it underflows, as for those that
    are masked, and makes more tensors of the size of the scores.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what replaces it."""
        return (_softmax if func is functional.softmax else func)(*args, **(kwargs or {}))


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    if dim is None:  # torch guesses one
        return functional.softmax(input, None, _stacklevel, dtype)
    return _Softmax.apply(input if dtype is None else input.to(dtype), dim)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return x.softmax(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        product = y * dx
        return product.addcmul_(y, product.sum(ctx.dim, keepdim=True), value=-1)
