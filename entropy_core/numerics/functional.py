"""What is estimated: E[F] with F = Σ_k f_k, a sum over the tokens of a response.

    ENTROPY     f_k = h_k     E[F] = H_seq
    LENGTH      f_k = 1       E[F] = L

A functional says what one token adds, as a plain function of the log-probability ℓ and the entropy h of its step. Its
derivative along a direction follows by the chain rule,

    ḟ_k = (∂f_k/∂ℓ_k) ℓ̇_k + (∂f_k/∂h_k) ḣ_k,

and so does its gradient. The formulas of `baselines`, `first_order`, `importance` and `path_integral` are written once,
for any functional. What is a ratio of two, such as the entropy per token, is estimated in `uncertainty`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenPair(NamedTuple):
    """One number for the ℓ and one for the h of every token, [K]: derivatives along a direction, or coefficients."""

    logprob_K: Tensor
    entropy_K: Tensor

    def dot(self, other: "TokenPair") -> Tensor:
        """The product, token by token, of both numbers: [K]."""
        return self.logprob_K * other.logprob_K + self.entropy_K * other.entropy_K

    def double(self) -> "TokenPair":
        """In float64."""
        return TokenPair(self.logprob_K.double(), self.entropy_K.double())


class Tokens(NamedTuple):
    """Some sequences under a policy, flat: sequence i has the tokens `offsets_N1[i]:offsets_N1[i + 1]`.

    Args:
        logprobs_K: ℓ, nats.
        entropies_K: h, nats.
        offsets_N1: int64 [N + 1].
        along: ℓ̇ and ḣ, their derivatives along a direction, nats per unit step; None where no direction is meant.
    """

    logprobs_K: Tensor
    entropies_K: Tensor
    offsets_N1: Tensor
    along: TokenPair | None = None

    @property
    def derivative(self) -> TokenPair:
        """ℓ̇ and ḣ, float64.

        Raises:
            ValueError: there are none.
        """
        if self.along is None:
            raise ValueError("this needs the derivatives of the tokens along a direction")
        return self.along.double()

    def first(self, sequences: int) -> "Tokens":
        """The first of the sequences."""
        offsets_N1 = self.offsets_N1[: sequences + 1]
        count = int(offsets_N1[-1])
        along = self.along and TokenPair(*(values_K[:count] for values_K in self.along))
        return Tokens(self.logprobs_K[:count], self.entropies_K[:count], offsets_N1, along)


class Functional(NamedTuple):
    """A quantity E[Σ_k f_k].

    Args:
        name: what it is called in files.
        of_tokens: f_k of every token of `Tokens`, [K]: differentiable in their ℓ and h, and of these f_k depends on the
            ones of step k alone.
        of_action: whether f_k depends on the token that is drawn at step k, and not on the prefix alone: so do a reward
            and a surprisal, while h_k and 1 do not.
    """

    name: str
    of_tokens: Callable[[Any], Tensor]
    of_action: bool = False

    def values(self, tokens: Tokens) -> Tensor:
        """f_k of every token, float64 [K]."""
        return self.of_tokens(tokens).double()

    def slopes(self, tokens: Tokens) -> TokenPair:
        """∂f_k/∂ℓ_k and ∂f_k/∂h_k of every token, float64 [K]: also what ∇f_k weighs ∇ℓ_k and ∇h_k with."""
        ends = [x_K.detach().double().requires_grad_() for x_K in (tokens.logprobs_K, tokens.entropies_K)]
        values_K = self.of_tokens(tokens._replace(logprobs_K=ends[0], entropies_K=ends[1]))
        if not values_K.requires_grad:
            return TokenPair(*(torch.zeros_like(end_K, requires_grad=False) for end_K in ends))
        return TokenPair(*torch.autograd.grad(values_K.sum(), ends, materialize_grads=True))

    def derivative(self, tokens: Tokens) -> Tensor:
        """ḟ_k of every token along the direction of the tokens, float64 [K]."""
        return self.slopes(tokens).dot(tokens.derivative)


class Columns(NamedTuple):
    """Per-sequence terms of a functional, float64 [N]; their means are the estimates."""

    total_N: Tensor  # F: of E[F]
    derivative_N: Tensor  # of ∂_vE[F]
    local_N: Tensor  # Σ_k ḟ_k, the part of `derivative_N` without the score function


def _entropies(tokens: Tokens) -> Tensor:
    return tokens.entropies_K


def _ones(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.entropies_K)


ENTROPY = Functional("entropy", _entropies)
LENGTH = Functional("length", _ones)
FUNCTIONALS = (ENTROPY, LENGTH)
"""Those that a sweep estimates."""


def ratio_slope(dnumerator: Tensor, ddenominator: Tensor, ratio: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Derivative of a ratio a/b, (ȧ − (a/b)ḃ)/b, from ȧ, ḃ, a/b and b; of the shape of ȧ and ḃ."""
    return (dnumerator - ratio * ddenominator) / denominator
