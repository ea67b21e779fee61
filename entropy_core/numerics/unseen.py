"""Actions that E never took: what is known of responses that E has not met.

A state is a prompt with the first tokens of a response. Where E visits a state, the probability of the tokens that no
response of E has there is known exactly: 1 minus the sum of those that were drawn. Summed over the steps of a response,
it is the expected number of departures from what E has seen. What comes after a departure is unknown. The step at
which a response is cut does not count, because nothing comes after it, whatever token is taken.

If departures are common, every response of E departs from the others, and E is a sample of what follows them. If they
are so rare that E holds hardly any, nothing in E tells what follows them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged

ENOUGH = 25.0
"""Expected number of departures from which a t interval over E covers what follows them."""
COMMON = 0.1
"""Expected number of departures per response of E from which they are the ordinary course of a response."""
MATERIAL = 0.1
"""Share of the entropy that unseen responses must be able to hold to matter."""


class Unseen(NamedTuple):
    """Sums over the steps of E.

    Args:
        probability: of departures, weighted to the policy.
        expected: of departures under the law that drew E.
        tokens: most tokens that can follow departures, times their probability, weighted to the policy.
    """

    probability: float
    expected: float
    tokens: float

    def plus(self, other: "Unseen") -> "Unseen":
        """Return the sums over both sets of states."""
        return Unseen(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Steps(NamedTuple):
    """Steps of E, each [K]: the states around it, ℓ, log q, the weight W of its prefix, and most tokens after it."""

    before_K: Tensor
    after_K: Tensor
    logprobs_K: Tensor
    log_q_K: Tensor
    weights_K: Tensor
    left_K: Tensor


def states(prompt_ids_N: Tensor, tokens_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return a 64-bit identity of the state after each token; equal prompts and tokens have equal ones.

    Args:
        prompt_ids_N: int64 [N].
        tokens_K: int64 [K].
        offsets_N1: int64 [N + 1].

    Returns:
        int64 [K].
    """
    mixed_K = _mixed((ragged.position_index(offsets_N1) << 32) + tokens_K + 1)
    total_K = mixed_K.cumsum(0)  # wraps around
    start_N = torch.cat([total_K.new_zeros(1), total_K])[offsets_N1[:-1]]
    root_N = _mixed(-prompt_ids_N - 1) - start_N
    return total_K + ragged.of_tokens(root_N, offsets_N1)


def states_before(prompt_ids_N: Tensor, after_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return the state before each token, from `states`: int64 [K]."""
    before_K = after_K.roll(1)
    filled_N = ragged.lengths(offsets_N1) > 0
    before_K[offsets_N1[:-1][filled_N]] = _mixed(-prompt_ids_N - 1)[filled_N]
    return before_K


def unseen(steps: Steps) -> Unseen:
    """Sum the probabilities of tokens that were never drawn at the states of E.

    Args:
        steps: all steps of E from some of its states.

    Returns:
        The sums.
    """
    order_K = steps.after_K.argsort()
    first_K = torch.ones_like(order_K, dtype=torch.bool)
    first_K[1:] = steps.after_K[order_K].diff() != 0
    taken_C = order_K[first_K]  # one step for each different token drawn at a state
    states_S, index_K = steps.before_K.unique(return_inverse=True)

    def rest_of(logprobs_K: Tensor) -> Tensor:
        seen_S = torch.zeros(len(states_S), dtype=torch.float64)
        seen_S.index_add_(0, index_K[taken_C], logprobs_K[taken_C].double().exp())
        return (1.0 - seen_S).clamp_min(0.0)[index_K] * (steps.left_K > 0)

    weighted_K = steps.weights_K * rest_of(steps.logprobs_K)
    expected, tokens = rest_of(steps.log_q_K).sum(), weighted_K @ steps.left_K.double()
    return Unseen(float(weighted_K.sum()), float(expected), float(tokens))


def _mixed(values: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values
