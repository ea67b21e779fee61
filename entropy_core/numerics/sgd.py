"""The next step of SGD with momentum, per unit of learning rate, its parts, and its derivative.

    g' = ±g + λθ,   b⁺ = μb + (1−τ)g',   v = −b⁺,   or with Nesterov's momentum  v = −(g' + μb⁺)

b is the momentum buffer before the step, μ the momentum, τ the dampening. The arithmetic is that of `torch.optim.SGD`.
Without momentum v = −g'. The step is linear in g, so that P and J are the same constant.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.next_step import Diagonal


class SGDHyperparameters(NamedTuple):
    """Hyperparameters of one parameter group; weight decay is added to the gradient."""

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    relative_lr: float = 1.0
    maximize: bool = False


class SGDState(NamedTuple):
    """The momentum buffer before the step; None without momentum. SGD does not count its steps."""

    step: int
    momentum_buffer: Tensor | None = None


class SGDStep(Diagonal):
    """The next step of one parameter by SGD; properties are computed on access.

    Args:
        gradient: g after clipping, float64, any shape.
        parameter: θ, same shape.
        state: the momentum buffer as saved.
        hyperparameters: hyperparameters of the parameter's group.
    """

    def __init__(
        self, gradient: Tensor, parameter: Tensor, state: SGDState, hyperparameters: SGDHyperparameters
    ) -> None:
        momentum, dampening, nesterov, weight_decay, relative_lr, maximize = hyperparameters
        of_buffer, of_gradient = momentum, 1.0
        if state.momentum_buffer is not None:
            of_gradient = 1.0 - dampening
            if nesterov:
                of_buffer, of_gradient = momentum**2, 1.0 + momentum * (1.0 - dampening)
        self._gradient, self._parameter, self._buffer = gradient, parameter, state.momentum_buffer
        self._step, self._sign, self._weight_decay = state.step, -1.0 if maximize else 1.0, weight_decay
        self._mu, self._undamped = momentum, 1.0 - dampening
        self._of_buffer, self._of_decay = -relative_lr * of_buffer, -relative_lr * of_gradient * weight_decay
        self._of_gradient = (relative_lr if maximize else -relative_lr) * of_gradient

    @property
    def momentum(self) -> Tensor:
        """Part of v from the saved momentum buffer."""
        return torch.zeros_like(self._gradient) if self._buffer is None else self._of_buffer * self._buffer

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""
        return self._of_gradient * self._gradient

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""
        return self._of_decay * self._parameter

    @property
    def preconditioner(self) -> Tensor:
        """Diagonal of P."""
        return torch.full_like(self._gradient, self._of_gradient)

    @property
    def direction(self) -> Tensor:
        """The step v per unit of learning rate."""
        return self.gradient.add_(self.momentum).add_(self.decay)

    @property
    def after(self) -> SGDState:
        """The momentum buffer after the step, from which the next one starts."""
        if self._buffer is None:
            return SGDState(self._step + 1)
        own = self._sign * self._gradient + self._weight_decay * self._parameter
        return SGDState(self._step + 1, self._mu * self._buffer + self._undamped * own)

    @property
    def jacobian(self) -> Tensor:
        """Diagonal of J."""
        return self.preconditioner
