"""The arithmetic of a pass: as exact as the weights are, or faster and less exact.

    full   every operation in the number format of the weights
    tf32   matrix products of float32 numbers that a GPU rounds to 10 bits first; in the trunk of the model
    bf16   the trunk under autocast: matrix products in bfloat16, with 7 bits

Only forward mode may be less exact. A log-probability is then wrong by 1e-3 to 1e-2, which is more than a step changes
it: the difference of two passes would be rounding. A derivative is wrong by such a part of itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from entropy_core.numerics.choices import Arithmetic


@contextmanager
def computing_in(arithmetic: Arithmetic, device: torch.device) -> Iterator[None]:
    """Context in which the trunk of a model with float32 weights computes in another arithmetic.

    Args:
        arithmetic: see the module.
        device: of the model; a CPU has no TF32.
    """
    if arithmetic == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    elif arithmetic == "tf32":
        with _products_of_float32("high"):
            yield
    else:
        yield


@contextmanager
def computing_in_full(device: torch.device) -> Iterator[None]:
    """Context in which everything is computed in the number format of its operands, within another arithmetic, too."""
    with torch.autocast(device.type, enabled=False), _products_of_float32("highest"):
        yield


@contextmanager
def _products_of_float32(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
