"""Faster forward-mode derivatives of softmax, linear layers, products and squares."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DirectDerivatives(TorchFunctionMode):
    """Context in which these functions use custom derivatives in forward mode; other modes are unaffected.

    `functional.softmax`: ẏ = y·(ẋ − Σ y·ẋ). Torch's derivative exponentiates every score a second time, which is slow
    if the exponential underflows, as for masked scores, and it allocates more score-sized tensors.

    `functional.linear`: ẏ = ẋWᵀ + xẆᵀ + ḃ. Terms without a tangent are skipped, and the second product is accumulated
    into the first. Torch's derivative multiplies by a matrix of zeros if W is constant, as all large matrices are
    under an adapter.

    `mul` and `pow(x, 2)`: ẋ·y + x·ẏ and 2·x·ẋ, with one new tensor each. Torch's derivative allocates three, and
    writing to new memory takes longer than the arithmetic.

    These derivatives cannot be differentiated in forward mode again: torch would treat them as constants. A second
    level of forward mode is therefore refused.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` or its replacement. Raises NotImplementedError within a second level of forward mode."""
        replacement = _REPLACED.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        _require_one_level()
        return replacement(*args, **(kwargs or {}))


def _require_one_level() -> None:
    levels = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        raise NotImplementedError(
            "a second level of forward mode over DirectDerivatives would come out as 0; take the derivative of the "
            "derivative outside of this context"
        )


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    if dim is None:  # deprecated: torch chooses the dimension
        return functional.softmax(input, None, _stacklevel, dtype)
    return _Softmax.apply(input if dtype is None else input.to(dtype), dim)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)


def _mul(input: Any, other: Any, **kwargs: Any) -> Tensor:
    plain = kwargs or not (_is_real(input) and _is_real(other) and input.dtype == other.dtype)
    return torch.mul(input, other, **kwargs) if plain else _Product.apply(input, other)


def _pow(input: Any, exponent: Any, **kwargs: Any) -> Tensor:
    plain = kwargs or not (_is_real(input) and isinstance(exponent, int) and exponent == 2)
    return torch.pow(input, exponent, **kwargs) if plain else _Square.apply(input)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    functional.softmax: _softmax,
    functional.linear: _linear,
    torch.mul: _mul,
    Tensor.mul: _mul,
    torch.pow: _pow,
    Tensor.pow: _pow,
    Tensor.__pow__: _pow,
}


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
        ctx.set_materialize_grads(False)  # constants get None instead of a tangent of zeros
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        shape, rows = (*x.shape[:-1], len(weight)), x.reshape(-1, x.shape[-1])
        dy = None if dx is None else functional.linear(dx.reshape(rows.shape), weight)
        if dweight is not None:
            dy = functional.linear(rows, dweight) if dy is None else dy.addmm_(rows, dweight.t())
        if dy is None:
            return dbias.expand(shape)
        return (dy if dbias is None else dy.add_(dbias)).view(shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None) -> Tensor:
        x, y = ctx.saved_tensors
        if dx is None:
            return x * dy
        return dx * y if dy is None else (dx * y).addcmul_(x, dy)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.pow(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x * dx).mul_(2)
