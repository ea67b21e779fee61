"""The next step of Muon, per unit of learning rate, its parts, and its derivative.

    b⁺ = μb + (1−μ)g,   u = b⁺, or with Nesterov's momentum (1−μ)g + μb⁺
    v  = −[ s·O(u) + λθ ],   O(u) = X_n:   X₀ = u/‖u‖,  X_{i+1} = (a + bA + cA²)X_i,  A = X_iX_iᵀ
    s  = √max(1, rows/columns), or Moonshot's 0.2·√max(rows, columns)

O brings the singular values of a matrix near 1 (Newton-Schulz). Sources: Jordan et al., kellerjordan.github.io/posts/
muon; Liu et al., arXiv:2502.16982 for the other scale. The arithmetic is that of `torch.optim.Muon`, which
orthogonalises in bfloat16: `taken` does so, too, and `direction` is what it would be without this rounding. Needs the
whole parameter, a matrix.

A step X_n = L·u has L = p_{n−1}(A_{n−1})…p_0(A_0)/‖u‖: symmetric, for all A_i commute. With L held fixed the step is
linear in u, and splits into parts from the momentum and from the gradient. J goes through all of it, in reverse.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class MuonHyperparameters(NamedTuple):
    """Hyperparameters of one parameter group; weight decay is decoupled, and not scaled.

    Attributes:
        momentum: μ.
        weight_decay: λ.
        nesterov: whether u looks ahead.
        coefficients: a, b and c of the iteration.
        ns_steps: n, the number of iterations.
        eps: least norm that u is divided by.
        match_rms_adamw: whether the scale is Moonshot's.
        relative_lr: the group's learning rate over the nominal one.
    """

    momentum: float
    weight_decay: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    ns_steps: int
    eps: float
    match_rms_adamw: bool = False
    relative_lr: float = 1.0


class MuonState(NamedTuple):
    """The momentum buffer before the step. Muon does not count its steps."""

    step: int
    momentum_buffer: Tensor


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations.

    Args:
        matrix: [rows, columns].
        coefficients: a, b and c.
        steps: number of iterations.
        eps: least norm that the matrix is divided by.
        dtype: of the arithmetic.

    Returns:
        The matrix in this dtype.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonStep:
    """The next step of one matrix by Muon.

    Args:
        gradient: g after clipping, float64 [rows, columns].
        parameter: θ, same shape.
        state: the momentum buffer as saved.
        hyperparameters: hyperparameters of the parameter's group.
    """

    def __init__(
        self, gradient: Tensor, parameter: Tensor, state: MuonState, hyperparameters: MuonHyperparameters
    ) -> None:
        h = hyperparameters
        rows, columns = gradient.shape
        mu = h.momentum
        self._of_buffer, self._of_gradient = (mu**2, 1.0 - mu**2) if h.nesterov else (mu, 1.0 - mu)
        scale = 0.2 * math.sqrt(max(rows, columns)) if h.match_rms_adamw else math.sqrt(max(1.0, rows / columns))
        self._rate, self._h = -h.relative_lr * scale, h
        self._gradient, self._buffer, self._step = gradient, state.momentum_buffer, state.step
        self._decay = (-h.relative_lr * h.weight_decay) * parameter
        self._linear = self._map()

    def _mixed(self, g: Tensor) -> Tensor:
        return self._of_buffer * self._buffer + self._of_gradient * g

    def _orthogonal(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        return orthogonalised(u, self._h.coefficients, self._h.ns_steps, self._h.eps, dtype)

    def _map(self) -> Tensor:
        """L, on the smaller side of the matrix."""
        a, b, c = self._h.coefficients
        u = self._mixed(self._gradient)
        x = u.T if u.shape[0] > u.shape[1] else u
        norm = x.norm().clamp(min=self._h.eps)
        whole, x = torch.eye(len(x), dtype=x.dtype, device=x.device) / norm, x / norm
        for _ in range(self._h.ns_steps):
            gram = x @ x.T
            one = a * torch.eye(len(x), dtype=x.dtype, device=x.device) + b * gram + c * (gram @ gram)
            whole, x = one @ whole, one @ x
        return whole

    def _applied(self, matrix: Tensor) -> Tensor:
        """L·matrix, or matrix·L where L is of the columns."""
        tall = matrix.shape[0] > matrix.shape[1]
        return self._rate * (matrix @ self._linear if tall else self._linear @ matrix)

    @property
    def momentum(self) -> Tensor:
        """Part of v from the momentum buffer."""
        return self._applied(self._of_buffer * self._buffer)

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""
        return self._applied(self._of_gradient * self._gradient)

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""
        return self._decay.clone()

    @property
    def direction(self) -> Tensor:
        """The step v, with the iterations in float64."""
        return self._rate * self._orthogonal(self._mixed(self._gradient), torch.float64) + self._decay

    @property
    def taken(self) -> Tensor:
        """The step v, with the iterations in bfloat16."""
        return self._rate * self._orthogonal(self._mixed(self._gradient), torch.bfloat16).double() + self._decay

    @property
    def after(self) -> MuonState:
        """The momentum buffer after the step, from which the next one starts."""
        mu = self._h.momentum
        return MuonState(self._step + 1, mu * self._buffer + (1.0 - mu) * self._gradient)

    def preconditioned(self, covector: Tensor) -> Tensor:
        """Return Pᵀ·a."""
        return self._of_gradient * self._applied(covector)

    def pulled_back(self, covector: Tensor) -> Tensor:
        """Return Jᵀ·a of the step in float64."""
        with torch.enable_grad():
            g = self._gradient.detach().clone().requires_grad_()
            step = self._rate * self._orthogonal(self._mixed(g), torch.float64)
            (pulled,) = torch.autograd.grad(step, g, covector)
        return pulled
