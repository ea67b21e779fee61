"""The next AdamW step v per unit of learning rate, its parts, and its derivative with respect to the gradient g.

    m⁺ = β₁m + (1−β₁)g,   u⁺ = β₂u + (1−β₂)g²,   d = √(u⁺/(1−β₂ᵗ)) + ε
    v  = δθ/lr = −[ m⁺/(1−β₁ᵗ)/d + λθ ]

θ are the parameters, m and u the moments before the step, t the number of this step. Source: Loshchilov and Hutter,
arXiv:1711.05101, with the arithmetic of `torch.optim.AdamW`. All tensors are float64. Everything except the clipping
norm is elementwise, so a tensor may be a whole parameter or any block of one.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.next_step import Diagonal
from entropy_core.numerics.vectors import K, Lazy, dot, global_norm

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class AdamHyperparameters(NamedTuple):
    """Hyperparameters of one parameter group.

    `relative_lr` is its learning rate divided by the nominal one. Weight decay that is not `decoupled` is plain Adam's,
    where λθ is added to the gradient. With `amsgrad` the denominator uses the largest second moment so far, and with
    `maximize` the step goes up the gradient.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    relative_lr: float = 1.0
    maximize: bool = False
    decoupled: bool = True
    amsgrad: bool = False


class AdamState(NamedTuple):
    """Moments of one parameter before the step, and the number of steps taken; `max_exp_avg_sq` only for AMSGrad."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


class NextStep(Diagonal):
    """The next AdamW step of one parameter, per unit of the nominal learning rate; properties are computed on access.

    v = momentum + gradient + decay. P and J = ∂v/∂g are diagonal. The preconditioner P treats the denominator as a
    constant, so gradient = P∘g splits v exactly; J includes the derivative of the denominator. In plain Adam the decay
    passes through the moments, and its part of the step is P∘λθ.

    Args:
        gradient: g after clipping, float64, any shape.
        parameter: θ, same shape.
        state: moments as saved; this step is number `state.step` + 1.
        hyperparameters: hyperparameters of the parameter's group.
    """

    def __init__(
        self, gradient: Tensor, parameter: Tensor, state: AdamState, hyperparameters: AdamHyperparameters
    ) -> None:
        beta1, beta2, eps, weight_decay, relative_lr, maximize, decoupled, _ = hyperparameters
        self._decoupled: bool = decoupled
        self._sign = -1.0 if maximize else 1.0
        t = state.step + 1
        correction1, correction2 = 1.0 - beta1**t, 1.0 - beta2**t
        self._gradient, self._parameter, self._state = gradient, parameter, state
        self._mean, self._beta2, self._correction2 = beta1, beta2, correction2
        self._of_momentum = -relative_lr * (beta1 / correction1)
        self._of_gradient = -relative_lr * ((1.0 - beta1) / correction1)
        self._of_decay = -relative_lr * weight_decay if self._decoupled else self._sign * weight_decay
        g = gradient if self._decoupled or not weight_decay else gradient + self._of_decay * parameter
        self._g = g if self._sign > 0 else -g
        variance = (state.exp_avg_sq * beta2).add_((self._g * (1.0 - beta2)).mul_(self._g))
        self._follows_gradient: Tensor | None = None  # mask of entries whose denominator depends on g; None: all
        if state.max_exp_avg_sq is not None:
            self._follows_gradient = variance >= state.max_exp_avg_sq
            torch.maximum(variance, state.max_exp_avg_sq, out=variance)
        self._root = variance.div_(correction2).pow_(0.5)  # unlike sqrt, pow does not start threads of its own
        self._denominator = self._root + eps

    def _frozen(self) -> Tensor:
        """Return ∂v/∂(signed g) with the denominator held fixed, as a new tensor."""
        return self._denominator.reciprocal().mul_(self._of_gradient)

    @property
    def momentum(self) -> Tensor:
        """Part of v from the saved first moment m."""
        return (self._state.exp_avg * self._of_momentum).div_(self._denominator)

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""
        return self._frozen().mul_(self._g) if self._decoupled else self.preconditioner.mul_(self._gradient)

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""
        decay = self._of_decay * self._parameter
        return decay if self._decoupled else decay.mul_(self.preconditioner)

    @property
    def preconditioner(self) -> Tensor:
        """Diagonal of P."""
        return self._frozen().mul_(self._sign)

    @property
    def direction(self) -> Tensor:
        """The step v per unit of learning rate."""
        v = self.gradient.addcdiv_(self._state.exp_avg, self._denominator, value=self._of_momentum)  # + momentum
        return v.add_(self.decay)

    @property
    def after(self) -> AdamState:
        """The moments after the step, from which the next one starts."""
        saved = self._state
        first = self._mean * saved.exp_avg + (1.0 - self._mean) * self._g
        second = self._beta2 * saved.exp_avg_sq + (1.0 - self._beta2) * self._g**2
        largest = saved.max_exp_avg_sq
        return AdamState(saved.step + 1, first, second, None if largest is None else torch.maximum(largest, second))

    @cached_property
    def jacobian(self) -> Tensor:
        """Diagonal of J, including the derivative of the denominator."""
        # d(denominator)/dg; root = 0 means that both moments and g are 0, and there the one-sided derivatives cancel
        slope = (1.0 - self._beta2) * self._g
        slope /= self._correction2 * self._root.clamp_min(torch.finfo(self._root.dtype).tiny)
        follows_gradient = self._root > 0
        if self._follows_gradient is not None:
            follows_gradient &= self._follows_gradient
        slope = torch.where(follows_gradient, slope, 0.0)
        frozen = self._frozen()
        moved = self.momentum.add_(frozen * self._g)
        return self._sign * (frozen - moved * slope / self._denominator)


def clip_factor(gradient_norm: float, max_norm: float) -> float:
    """Return min(1, max_norm/(‖g‖ + 1e-6)), the factor that clips the gradient; `max_norm` 0 disables clipping."""
    return min(1.0, max_norm / (gradient_norm + CLIP_EPSILON)) if max_norm > 0 else 1.0


def pull_back(
    covector: Mapping[K, Tensor], jacobian: Mapping[K, Tensor], gradient: Mapping[K, Tensor], max_norm: float
) -> Lazy[K]:
    """Return Jᵀ·a for the whole step including clipping, the vector w with d⟨a, v⟩ = ⟨w, dg⟩.

    With c the clip factor and n = ‖g‖:  w = c·Ja − [c/((n + 1e-6)·n)]·⟨g, Ja⟩·g, the second term only when c < 1.

    Args:
        covector: a, for example ∇H.
        jacobian: diagonal of J at the clipped gradient.
        gradient: g before clipping.
        max_norm: clipping norm; 0 for no clipping.

    Returns:
        w, lazily, with the keys of `jacobian`, float64.
    """
    pulled = Lazy(list(jacobian), lambda key: jacobian[key].double() * covector[key].double())
    norm = global_norm(gradient)
    return through_clipping(pulled, gradient, norm, dot(gradient, pulled), max_norm)


def through_clipping(
    pulled: Mapping[K, Tensor],
    gradient: Mapping[K, Tensor],
    norm: float,
    product: float,
    max_norm: float,
) -> Lazy[K]:
    """Return what `pull_back` does, for a step whose Jᵀ·a at the clipped gradient is `pulled`.

    Args:
        pulled: Ja.
        gradient: g before clipping.
        norm: ‖g‖.
        product: ⟨g, Ja⟩; not used if the gradient is not clipped.
        max_norm: clipping norm; 0 for no clipping.

    Returns:
        w, lazily, with the keys of `pulled`, float64.
    """
    factor = clip_factor(norm, max_norm)
    if norm == 0.0 or factor == 1.0:
        return Lazy(list(pulled), lambda key: factor * pulled[key])
    along = factor / ((norm + CLIP_EPSILON) * norm) * product
    return Lazy(list(pulled), lambda key: factor * pulled[key] - along * gradient[key].double())
