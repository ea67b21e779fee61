"""Faster forward-mode derivatives of softmax, linear layers, sums, products and squares."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DirectDerivatives(TorchFunctionMode):
    """Context in which these functions compute the tangents of dual tensors themselves; other calls are unaffected.

    `functional.softmax`: ẏ = y·(ẋ − Σ y·ẋ). Torch's derivative exponentiates every score a second time, which is slow
    if the exponential underflows, as for masked scores, and it allocates more score-sized tensors.

    `functional.linear`: ẏ = ẋWᵀ + xẆᵀ + ḃ. Terms without a tangent are skipped, and the second product is accumulated
    into the first. Torch's derivative multiplies by a matrix of zeros if W is constant, as all large matrices are
    under an adapter.

    `add`, `mul` and `pow(x, 2)`: ẋ + ẏ, ẋ·y + x·ẏ and 2·x·ẋ, with one new tensor each. Torch's derivative of a product
    allocates three, and writing to new memory takes longer than the arithmetic. Where one operand is a constant, torch
    takes a way through Python that is slower than a GPU's kernel.

    Under autocast each of them computes in the dtype that autocast gives to its value.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or its rule if an argument of it is dual."""
        rule = _RULES.get(func)
        found = None if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else forward_ad.make_dual(*found)


Found = tuple[Tensor, Tensor] | None
"""A value and its tangent; None where torch's own derivative is to be used, or nothing is dual."""


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Found:
    x, dx = forward_ad.unpack_dual(input)
    if dx is None or dim is None:  # without a dimension, which is deprecated, torch chooses one
        return None
    y = functional.softmax(x, dim, dtype=dtype)
    product = y * dx
    return y, product.addcmul_(y, product.sum(dim, keepdim=True), value=-1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    (x, dx), (w, dw), (b, db) = (_unpacked(operand) for operand in (input, weight, bias))
    if dx is None and dw is None and db is None:
        return None
    x, dx, w, dw, b, db = (_as_in_products(operand) for operand in (x, dx, w, dw, b, db))
    y, rows = functional.linear(x, w, b), x.reshape(-1, x.shape[-1])
    dy = None if dx is None else functional.linear(dx.reshape(rows.shape), w)
    if dw is not None:
        dy = functional.linear(rows, dw) if dy is None else dy.addmm_(rows, dw.t())
    if dy is None:
        return y, db.expand_as(y).clone()
    return y, (dy if db is None else dy.add_(db)).view(y.shape)


def _add(input: Any, other: Any, **kwargs: Any) -> Found:
    if kwargs or not _alike(input, other):
        return None
    (x, dx), (y, dy) = _unpacked(input), _unpacked(other)
    if dx is None and dy is None:
        return None
    total = torch.add(x, y)
    if dx is None or dy is None:
        return total, (dy if dx is None else dx).expand_as(total).clone()
    return total, dx + dy


def _mul(input: Any, other: Any, **kwargs: Any) -> Found:
    if kwargs or not _alike(input, other):
        return None
    (x, dx), (y, dy) = _unpacked(input), _unpacked(other)
    if dx is None and dy is None:
        return None
    product = torch.mul(x, y)
    if dx is None:
        return product, x * dy
    return product, dx * y if dy is None else (dx * y).addcmul_(x, dy)


def _pow(input: Any, exponent: Any, **kwargs: Any) -> Found:
    if kwargs or not (isinstance(input, Tensor) and isinstance(exponent, int) and exponent == 2):
        return None
    x, dx = _unpacked(input)
    if dx is None:
        return None
    y = torch.pow(x, 2)  # in float32 under autocast
    return y, (x.to(y.dtype) * dx).mul_(2)


def _unpacked(operand: Any) -> tuple[Any, Any]:
    """Return the value and the tangent of an operand, which may be a number or None."""
    return forward_ad.unpack_dual(operand) if isinstance(operand, Tensor) else (operand, None)


def _as_in_products(operand: Any) -> Any:
    """Cast an operand of a matrix product as autocast does, which leaves out products into an existing tensor."""
    if operand is None or not torch.is_autocast_enabled(operand.device.type) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))


def _alike(input: Any, other: Any) -> bool:
    """Return whether the result has the dtype of the operands that are tensors."""
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        return input.dtype == other.dtype
    return isinstance(other if isinstance(input, Tensor) else input, int | float)


_RULES: dict[Any, Callable[..., Found]] = {
    functional.softmax: _softmax,
    functional.linear: _linear,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _pow),
}
