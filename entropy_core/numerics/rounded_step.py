"""The AdamW step of weights that are kept in bfloat16 or float16, with every rounding of `torch.optim.AdamW`.

The weights and both moments have the narrow dtype. torch's for-loop implementation rounds after every operation, and so
does foreach on a GPU; the fused one computes in float32, and rounds weights and moments when it stores them. So torch's
own code takes the step here. (foreach on a CPU, which nobody gets without asking for it, rounds β₂ as well.) A weight
stays where it is if its step is less than half the distance to the next number.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from entropy_core.numerics.adamw import CLIP_EPSILON, AdamHyperparameters, AdamState


class Rounded(NamedTuple):
    """θ_new − θ, exact, and the moments after the step; float64."""

    change: Tensor
    after: AdamState


def rounded_step(
    gradient: Tensor,
    parameter: Tensor,
    state: AdamState,
    hyperparameters: AdamHyperparameters,
    learning_rate: float,
    dtype: torch.dtype,
    fused: bool,
) -> Rounded:
    """Compute the change of one parameter, or of any block of it, by the step.

    Args:
        gradient: g, already rounded to `dtype` and clipped, any shape.
        parameter: θ, same shape; holds numbers of `dtype`.
        state: moments before the step; hold numbers of `dtype`.
        hyperparameters: hyperparameters of the parameter's group.
        learning_rate: the nominal one.
        dtype: bfloat16 or float16.
        fused: whether the trainer's optimizer was torch's fused one.

    Returns:
        The change, and the state that the next step starts from.
    """
    h = hyperparameters
    theta, first, second = (tensor.to(dtype, copy=True) for tensor in (parameter, state.exp_avg, state.exp_avg_sq))
    largest = [] if state.max_exp_avg_sq is None else [state.max_exp_avg_sq.to(dtype, copy=True)]
    before = theta.double()
    adam(
        [theta],
        [gradient.to(dtype)],
        [first],
        [second],
        largest,
        [torch.tensor(float(state.step))],
        foreach=False,
        fused=fused,
        amsgrad=h.amsgrad,
        beta1=h.beta1,
        beta2=h.beta2,
        lr=h.relative_lr * learning_rate,
        weight_decay=h.weight_decay,
        eps=h.eps,
        maximize=h.maximize,
        decoupled_weight_decay=h.decoupled,
    )
    moments = (first.double(), second.double(), largest[0].double() if largest else None)
    return Rounded(theta.double() - before, AdamState(state.step + 1, *moments))


def rounded_clip_factor(gradients: Iterable[tuple[Tensor, torch.dtype]], max_norm: float) -> float:
    """Compute min(1, max_norm/(‖g‖ + 1e-6)) as `clip_grad_norm_` does for gradients of narrow dtypes.

    The norm of each gradient is rounded to its dtype, and so is the norm of all of them if they have the same dtype.

    Args:
        gradients: gradient of each parameter, and its dtype in the trainer.
        max_norm: clipping norm; 0 for no clipping.

    Returns:
        The factor.
    """
    if max_norm <= 0:
        return 1.0
    norms = [torch.linalg.vector_norm(gradient.to("cpu", dtype)) for gradient, dtype in gradients]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    total = torch.linalg.vector_norm(torch.stack([norm.to(widest) for norm in norms]))
    return float((max_norm / (total + CLIP_EPSILON)).clamp(max=1.0))
