"""The next step of Lion, per unit of learning rate, and its parts.

    c = β₁m + (1−β₁)g,   v = −[ sign(c) + λθ ]

m is the moment before the step. Source: Chen et al., arXiv:2302.06675; lion-pytorch and bitsandbytes compute the same.
With the denominator |c| held fixed, sign(c) = c/|c| splits into a part from m and one from g. The derivative of the
step itself is 0 wherever it exists: v depends only on signs, and jumps where c changes sign. So the derivative says
nothing about how v varies from batch to batch, and no interval over U is derived from it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.next_step import Diagonal


class LionHyperparameters(NamedTuple):
    """Hyperparameters of one parameter group; weight decay is decoupled."""

    beta1: float
    weight_decay: float
    relative_lr: float = 1.0


class LionState(NamedTuple):
    """The moment before the step."""

    step: int
    exp_avg: Tensor


class LionStep(Diagonal):
    """The next step of one parameter by Lion; properties are computed on access.

    Args:
        gradient: g after clipping, float64, any shape.
        parameter: θ, same shape.
        state: the moment as saved.
        hyperparameters: hyperparameters of the parameter's group.
    """

    def __init__(
        self, gradient: Tensor, parameter: Tensor, state: LionState, hyperparameters: LionHyperparameters
    ) -> None:
        beta1, weight_decay, relative_lr = hyperparameters
        self._gradient, self._parameter = gradient, parameter
        self._of_moment, self._of_gradient = beta1 * state.exp_avg, 1.0 - beta1
        self._of_decay, self._rate = -relative_lr * weight_decay, -relative_lr
        self._mixed = self._of_moment + self._of_gradient * gradient
        magnitude = self._mixed.abs()
        self._inverse = torch.where(magnitude > 0, self._rate / magnitude, 0.0)  # sign(0) = 0

    @property
    def momentum(self) -> Tensor:
        """Part of v from the saved moment m."""
        return self._of_moment * self._inverse

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""
        return self.preconditioner.mul_(self._gradient)

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""
        return self._of_decay * self._parameter

    @property
    def preconditioner(self) -> Tensor:
        """Diagonal of P."""
        return self._of_gradient * self._inverse

    @property
    def direction(self) -> Tensor:
        """The step v per unit of learning rate."""
        return self._rate * self._mixed.sign() + self.decay

    @property
    def jacobian(self) -> Tensor:
        """Diagonal of J: 0."""
        return torch.zeros_like(self._gradient)
