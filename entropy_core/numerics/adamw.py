"""The step that AdamW would take next, its parts, and its derivative with respect to the gradient.

    m⁺ = β₁m + (1−β₁)g,   u⁺ = β₂u + (1−β₂)g²,   d = √(u⁺/(1−β₂ᵗ)) + ε
    v  = δθ/lr = −[ m⁺/(1−β₁ᵗ)/d + λθ ]

Loshchilov and Hutter, arXiv:1711.05101, in the arithmetic of `torch.optim.AdamW`. All tensors are float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class AdamHyperparameters(NamedTuple):
    """Of one parameter group. `relative_lr` is its learning rate divided by the nominal one."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    relative_lr: float = 1.0
    maximize: bool = False


class AdamState(NamedTuple):
    """Moments of one parameter before the step, and the number of steps taken; `max_exp_avg_sq` only for AMSGrad."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


class UpdateParts(NamedTuple):
    """v = momentum + decay + gradient, and two diagonals: of P, with gradient = P∘g, and of J = ∂v/∂g.

    P holds the denominator as it is, so it splits v exactly; J has the denominator's own derivative in it.
    """

    momentum: Tensor
    decay: Tensor
    gradient: Tensor
    jacobian: Tensor
    preconditioner: Tensor

    @property
    def direction(self) -> Tensor:
        """v, the step per unit of learning rate."""
        return self.momentum + self.gradient + self.decay


def update_direction(
    gradient: Tensor, parameter: Tensor, state: AdamState, hyperparameters: AdamHyperparameters
) -> UpdateParts:
    """The next AdamW step of one parameter, per unit of the nominal learning rate.

    Args:
        gradient: g after clipping, float64, any shape.
        parameter: θ, same shape.
        state: moments as saved; the step taken here is number `state.step` + 1.
        hyperparameters: of the parameter's group.

    Returns:
        Five float64 tensors of that shape.
    """
    beta1, beta2, eps, weight_decay, relative_lr, maximize = hyperparameters
    sign = -1.0 if maximize else 1.0
    t = state.step + 1
    correction1, correction2 = 1.0 - beta1**t, 1.0 - beta2**t
    g = sign * gradient
    variance = beta2 * state.exp_avg_sq + (1.0 - beta2) * g * g
    follows_gradient = torch.ones_like(variance)
    if state.max_exp_avg_sq is not None:
        follows_gradient = (variance >= state.max_exp_avg_sq).double()
        variance = torch.maximum(variance, state.max_exp_avg_sq)
    root = (variance / correction2).sqrt()
    denominator = root + eps
    momentum = -relative_lr * (beta1 / correction1) * state.exp_avg / denominator
    frozen = -relative_lr * ((1.0 - beta1) / correction1) / denominator
    gradient_part = frozen * g
    # d(denominator)/dg; at root = 0 both moments and g are 0, where the one-sided derivatives cancel
    slope = follows_gradient * (1.0 - beta2) * g / (correction2 * root.clamp_min(torch.finfo(root.dtype).tiny))
    slope = torch.where(root > 0, slope, 0.0)
    jacobian = sign * (frozen - (momentum + gradient_part) * slope / denominator)
    return UpdateParts(momentum, -relative_lr * weight_decay * parameter, gradient_part, jacobian, sign * frozen)


def coupled_update_direction(
    gradient: Tensor, parameter: Tensor, state: AdamState, hyperparameters: AdamHyperparameters
) -> UpdateParts:
    """The same for plain Adam, whose weight decay λθ is added to the gradient; its share of the step is the decay part.

    Args, returns:
        as `update_direction`.
    """
    sign = -1.0 if hyperparameters.maximize else 1.0
    decay = sign * hyperparameters.weight_decay * parameter
    parts = update_direction(gradient + decay, parameter, state, hyperparameters._replace(weight_decay=0.0))
    return parts._replace(decay=parts.preconditioner * decay, gradient=parts.preconditioner * gradient)


def clip_factor(gradient_norm: float, max_norm: float) -> float:
    """Factor min(1, max_norm/(‖g‖ + 1e-6)) by which the gradient is scaled; `max_norm` 0 means no clipping."""
    return min(1.0, max_norm / (gradient_norm + CLIP_EPSILON)) if max_norm > 0 else 1.0


def pull_back(
    covector: dict[str, Tensor], jacobian: dict[str, Tensor], gradient: dict[str, Tensor], max_norm: float
) -> dict[str, Tensor]:
    """Jᵀ·a for the whole step, clipping included: the w with d⟨a, v⟩ = ⟨w, dg⟩.

    With c the clip factor and n = ‖g‖:  w = c·Ja − [c/((n + 1e-6)·n)]·⟨g, Ja⟩·g, the second term only when c < 1.

    Args:
        covector: a, by parameter name.
        jacobian: the diagonal of `UpdateParts`, by parameter name.
        gradient: g before clipping, by parameter name.
        max_norm: as in `clip_factor`.

    Returns:
        w by parameter name, float64.
    """
    pulled = {name: jacobian[name].double() * covector[name].double() for name in jacobian}
    norm = global_norm(gradient)
    factor = clip_factor(norm, max_norm)
    if norm == 0.0:
        return {name: factor * w for name, w in pulled.items()}
    if factor == 1.0:
        return pulled
    along = factor / ((norm + CLIP_EPSILON) * norm) * dot(gradient, pulled)
    return {name: factor * pulled[name] - along * gradient[name].double() for name in pulled}


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """⟨a, b⟩ over all parameters, in float64, summed in the order of the names."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in sorted(a))


def global_norm(a: dict[str, Tensor]) -> float:
    """‖a‖₂ over all parameters, in float64."""
    return dot(a, a) ** 0.5
