"""The next step of Adafactor, per unit of learning rate, its parts, and its derivative.

    r⁺ = βr + (1−β)·mean over columns of g²+ε₁,   c⁺ the same over rows,   β = 1 − tᵈ
    u  = g/√(r⁺c⁺/mean r⁺),   û = u/max(1, rms(u)/τ)
    v  = −[ s·û + λ'θ ],   s = max(ε₂, rms(θ)) if the step is scaled with the parameter, else 1

The squares of a vector, or of a number, are kept as they are. Source: Shazeer and Stern, arXiv:1804.04235; two
implementations, which differ where `AdafactorHyperparameters` says. A row's mean of g² depends on all of the row and
rms(u) on all of the parameter, so that J is a full matrix, and Jᵀa is had by going through the step in reverse. Needs
the whole parameter.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdafactorHyperparameters(NamedTuple):
    """Hyperparameters of one parameter group.

    Attributes:
        eps1: ε₁. transformers adds it to g²; torch bounds the mean of r⁺ by it from below, and the estimate by its
            square.
        eps2: least scale of a parameter.
        clip_threshold: τ.
        decay_rate: d.
        weight_decay: λ.
        lr: the group's own learning rate.
        beta1: of transformers' moving average of the step; None without one.
        scale_parameter: whether the step is scaled with the parameter.
        of_torch: whether it is torch.optim's, with its lr ≤ 1/√t, and a decay that is not scaled.
        relative_lr: `lr` over the nominal learning rate.
        maximize: whether the step goes up the gradient.
    """

    eps1: float
    eps2: float
    clip_threshold: float
    decay_rate: float
    weight_decay: float
    lr: float
    beta1: float | None = None
    scale_parameter: bool = True
    of_torch: bool = False
    relative_lr: float = 1.0
    maximize: bool = False


class AdafactorState(NamedTuple):
    """Moments of one parameter before the step: those of a matrix by rows and columns, or those of a vector.

    `exp_avg_sq_row`, `exp_avg_sq_col` and `exp_avg_sq` are transformers', the others torch's; `exp_avg` is the moving
    average of steps times learning rate.
    """

    step: int
    exp_avg_sq_row: Tensor | None = None
    exp_avg_sq_col: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    exp_avg: Tensor | None = None
    row_var: Tensor | None = None
    col_var: Tensor | None = None
    variance: Tensor | None = None


def own_learning_rate(step: int, warmup_init: bool) -> float:
    """Return the learning rate that transformers' Adafactor with `relative_step` gives itself for a step."""
    return min(1e-6 * step if warmup_init else 1e-2, 1.0 / math.sqrt(step))


class AdafactorStep:
    """The next step of one parameter by Adafactor.

    Args:
        gradient: g after clipping, float64, the parameter's shape.
        parameter: θ, same shape.
        state: moments as saved; this step is number `state.step` + 1.
        hyperparameters: hyperparameters of the parameter's group.
    """

    def __init__(
        self, gradient: Tensor, parameter: Tensor, state: AdafactorState, hyperparameters: AdafactorHyperparameters
    ) -> None:
        h, t = hyperparameters, state.step + 1
        self._gradient, self._state, self._h = gradient, state, h
        self._sign = -1.0 if h.maximize else 1.0
        self._fresh = t**h.decay_rate  # 1 − β
        rate = h.relative_lr
        if h.of_torch:
            rate *= min(1.0, 1.0 / (h.lr * math.sqrt(t)))
        scale = max(h.eps2, _rms(parameter)) if h.scale_parameter else 1.0
        self._nominal = h.lr / h.relative_lr
        self._rate = -rate * scale
        self._decay = (-h.relative_lr if h.of_torch else self._rate) * h.weight_decay * parameter
        if h.beta1 is not None:
            self._rate *= 1.0 - h.beta1
        self._inverse = self._inverse_denominator(gradient)

    def _inverse_denominator(self, g: Tensor) -> Tensor:
        """û/g: what a gradient is multiplied with, its clipping to `clip_threshold` included."""
        h = self._h
        inverse = self._by_torch(g) if h.of_torch else self._by_transformers(g)
        rms = (inverse * g).square().mean().sqrt() if bool((g != 0).any()) else g.new_zeros(())
        return inverse / (rms / h.clip_threshold).clamp(min=1.0)

    def _by_transformers(self, g: Tensor) -> Tensor:
        state, fresh = self._state, self._fresh
        squares = g.square() + self._h.eps1
        if state.exp_avg_sq_row is None or state.exp_avg_sq_col is None:
            assert state.exp_avg_sq is not None
            return (state.exp_avg_sq * (1.0 - fresh) + fresh * squares).rsqrt()
        row = state.exp_avg_sq_row * (1.0 - fresh) + fresh * squares.mean(-1)
        column = state.exp_avg_sq_col * (1.0 - fresh) + fresh * squares.mean(-2)
        return (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)

    def _by_torch(self, g: Tensor) -> Tensor:
        state, fresh, least = self._state, self._fresh, self._h.eps1
        if state.row_var is None or state.col_var is None:
            assert state.variance is not None
            estimate = state.variance.lerp(g.square(), fresh)
        else:
            row = state.row_var.lerp(g.square().mean(-1, keepdim=True), fresh)
            column = state.col_var.lerp(g.square().mean(-2, keepdim=True), fresh)
            estimate = row @ column / row.mean(-2, keepdim=True).clamp(min=least)
        return estimate.clamp(min=least**2).rsqrt()

    @property
    def momentum(self) -> Tensor:
        """Part of v from the moving average of steps."""
        if self._h.beta1 is None or self._state.exp_avg is None:
            return torch.zeros_like(self._gradient)
        return self._state.exp_avg * (-self._h.beta1 / self._nominal)

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""
        return self.preconditioned(self._gradient)

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""
        return self._decay.clone()

    @property
    def direction(self) -> Tensor:
        """The step v per unit of learning rate."""
        return self.momentum + self.gradient + self.decay

    @property
    def taken(self) -> Tensor:
        """The step v as the optimizer computes it."""
        return self.direction

    def preconditioned(self, covector: Tensor) -> Tensor:
        """Return P·a; P is diagonal."""
        return (self._sign * self._rate) * self._inverse * covector

    def pulled_back(self, covector: Tensor) -> Tensor:
        """Return Jᵀ·a."""
        with torch.enable_grad():
            g = self._gradient.detach().clone().requires_grad_()
            step = (self._sign * self._rate) * self._inverse_denominator(g) * g
            (pulled,) = torch.autograd.grad(step, g, covector)
        return pulled


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm(2)) / math.sqrt(tensor.numel())
