"""Estimated quantities E[F] with F = Σ_k f_k, a sum over the tokens of a response.

    ENTROPY     f_k = h_k                             E[F] = H_seq
    LENGTH      f_k = 1                               E[F] = L
    REWARD      f_k = the reward at the last token    E[F] = J, the expected reward

A functional defines the term f_k of one token as a plain function of its log-probability ℓ_k and of the entropy h_k of
the distribution it was drawn from. The derivative along a direction follows by the chain rule,

    ḟ_k = (∂f_k/∂ℓ_k) ℓ̇_k + (∂f_k/∂h_k) ḣ_k,

and so does the gradient. `baselines`, `first_order`, `importance` and `path_integral` work for any functional. Ratios
of two functionals, such as the entropy per token, are estimated in `uncertainty`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenPair(NamedTuple):
    """One number per token for ℓ and one for h, each [K]: derivatives along a direction, or coefficients."""

    logprob_K: Tensor
    entropy_K: Tensor

    def dot(self, other: "TokenPair") -> Tensor:
        """Return the dot product of the two pairs at each token: [K]."""
        return self.logprob_K * other.logprob_K + self.entropy_K * other.entropy_K

    def double(self) -> "TokenPair":
        """Convert both tensors to float64."""
        return TokenPair(self.logprob_K.double(), self.entropy_K.double())


class Tokens(NamedTuple):
    """Tokens of N sequences under one policy, flat: sequence i has the tokens `offsets_N1[i]:offsets_N1[i + 1]`.

    Args:
        logprobs_K: ℓ, nats.
        entropies_K: h, nats.
        offsets_N1: int64 [N + 1].
        along: ℓ̇ and ḣ, derivatives along a direction, nats per unit step; None if there is no direction.
        proposal_logprobs_K: log q of each token under the law that drew it; None if this policy drew the tokens.
        rewards_K: the reward of a response at its last token, and 0 at the others; None if rewards are not known.
    """

    logprobs_K: Tensor
    entropies_K: Tensor
    offsets_N1: Tensor
    along: TokenPair | None = None
    proposal_logprobs_K: Tensor | None = None
    rewards_K: Tensor | None = None

    @property
    def drawn_logprobs_K(self) -> Tensor:
        """log q of each token under the law that drew it, nats."""
        return self.logprobs_K if self.proposal_logprobs_K is None else self.proposal_logprobs_K

    @property
    def derivative(self) -> TokenPair:
        """ℓ̇ and ḣ, float64.

        Raises:
            ValueError: the tokens have no derivatives.
        """
        if self.along is None:
            raise ValueError("this needs the derivatives of the tokens along a direction")
        return self.along.double()

    def first(self, sequences: int) -> "Tokens":
        """Return the first `sequences` of these sequences."""
        offsets_N1 = self.offsets_N1[: sequences + 1]
        count = int(offsets_N1[-1])
        along = self.along and TokenPair(*(values_K[:count] for values_K in self.along))
        others = (None if x_K is None else x_K[:count] for x_K in (self.proposal_logprobs_K, self.rewards_K))
        return Tokens(self.logprobs_K[:count], self.entropies_K[:count], offsets_N1, along, *others)

    def rewarded(self, rewards_N: Tensor) -> "Tokens":
        """Return the same with the reward of each response, [N]; every response has a token."""
        rewards_K = torch.zeros(len(self.logprobs_K), dtype=torch.float64)
        rewards_K[self.offsets_N1[1:] - 1] = rewards_N.double()
        return self._replace(rewards_K=rewards_K)


class Functional(NamedTuple):
    """A quantity E[Σ_k f_k].

    Args:
        name: its name in files.
        of_tokens: maps `Tokens` to f_k of every token, [K]; differentiable in ℓ and h, and f_k depends on ℓ_k and h_k
            of its own step only.
        of_action: whether f_k depends on the token drawn at step k and not only on the prefix. A reward and a
            surprisal do, while h_k and 1 do not.
    """

    name: str
    of_tokens: Callable[[Any], Tensor]
    of_action: bool = False

    def values(self, tokens: Tokens) -> Tensor:
        """Return f_k of every token, float64 [K]."""
        return self.of_tokens(tokens).double()

    def slopes(self, tokens: Tokens) -> TokenPair:
        """Return ∂f_k/∂ℓ_k and ∂f_k/∂h_k, the coefficients of ∇ℓ_k and ∇h_k in ∇f_k, float64 [K]."""
        ends = [x_K.detach().double().requires_grad_() for x_K in (tokens.logprobs_K, tokens.entropies_K)]
        values_K = self.of_tokens(tokens._replace(logprobs_K=ends[0], entropies_K=ends[1]))
        if not values_K.requires_grad:
            return TokenPair(*(torch.zeros_like(end_K, requires_grad=False) for end_K in ends))
        return TokenPair(*torch.autograd.grad(values_K.sum(), ends, materialize_grads=True))

    def derivative(self, tokens: Tokens) -> Tensor:
        """Return ḟ_k, the derivative along the direction of `tokens.along`, float64 [K]."""
        return self.slopes(tokens).dot(tokens.derivative)


class Columns(NamedTuple):
    """Per-sequence terms of a functional, float64 [N]; their means are the estimates."""

    total_N: Tensor  # terms of E[F]
    derivative_N: Tensor  # terms of ∂_vE[F]
    local_N: Tensor  # Σ_k ḟ_k, the part of `derivative_N` without the score function


def _entropies(tokens: Tokens) -> Tensor:
    return tokens.entropies_K


def _ones(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.entropies_K)


def _rewards(tokens: Tokens) -> Tensor:
    if tokens.rewards_K is None:
        raise ValueError("the rewards of these responses are not known")
    return tokens.rewards_K


ENTROPY = Functional("entropy", _entropies)
LENGTH = Functional("length", _ones)
REWARD = Functional("reward", _rewards, of_action=True)
FUNCTIONALS = (ENTROPY, LENGTH)
"""The functionals that every sweep estimates."""


def ratio_slope(dnumerator: Tensor, ddenominator: Tensor, ratio: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Return the derivative (ȧ − (a/b)ḃ)/b of a ratio a/b, from ȧ, ḃ, a/b and b; same shape as ȧ and ḃ."""
    return (dnumerator - ratio * ddenominator) / denominator
