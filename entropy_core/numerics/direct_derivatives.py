"""Forward-mode derivatives of attention's softmax and of linear layers that compute no more than they must."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DirectDerivatives(TorchFunctionMode):
    """Within the context these functions have derivatives of their own in forward mode, and in no other mode.

    `functional.softmax`: ẏ = y·(ẋ − Σ y·ẋ). Torch's own takes the exponential of every score a second time, which is
    slow where it underflows, as for those that are masked, and makes more tensors of the size of the scores.

    `functional.linear`: ẏ = ẋWᵀ + xẆᵀ + ḃ, each term only where there is something to it. Torch's own multiplies by a
    matrix of zeros where W is a constant, as all large ones are under an adapter.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what replaces it."""
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    if dim is None:  # torch guesses one
        return functional.softmax(input, None, _stacklevel, dtype)
    return _Softmax.apply(input if dtype is None else input.to(dtype), dim)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)


_REPLACED: dict[Any, Callable[..., Tensor]] = {functional.softmax: _softmax, functional.linear: _linear}


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.set_materialize_grads(False)  # no zeros for what is constant
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = [functional.linear(dx, weight)] if dx is not None else []
        if dweight is not None:
            terms.append(functional.linear(x, dweight))
        if dbias is not None:
            terms.append(dbias.expand(*x.shape[:-1], len(dbias)))
        return sum(terms[1:], start=terms[0])
