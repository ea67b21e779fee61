"""Likelihood ratios of prefixes: weights that make sequences drawn from one law stand for those of another.

W_k = Π_{j<k} π(a_j|s_j)/q(a_j|s_j),  W_1 = 1,          W_{T+1} is the weight of a whole sequence of T tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.functional import Functional, Tokens


class PrefixWeights(NamedTuple):
    """ρ_k and ρ_{k+1} of every token, float64 [K], and w of every sequence, float64 [N]."""

    before_K: Tensor
    after_K: Tensor
    sequence_N: Tensor

    def of(self, functional: Functional) -> Tensor:
        """Return r_k, the weight of f_k, [K]."""
        return self.after_K if functional.of_action else self.before_K


def prefix_weights(logprobs_K: Tensor, moved_logprobs_K: Tensor, offsets_N1: Tensor) -> PrefixWeights:
    """Compute the likelihood ratio of every prefix.

    Args:
        logprobs_K: ℓ at θ, nats, [K].
        moved_logprobs_K: ℓ' at θ', nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        Weights, accumulated in float64; exactly 1 if ℓ' = ℓ at all tokens of the prefix.
    """
    log_ratio_K = moved_logprobs_K.double() - logprobs_K.double()
    log_before_K = ragged.sum_before(log_ratio_K, offsets_N1)
    sequence_N = ragged.sequence_sum(log_ratio_K, offsets_N1).exp()
    return PrefixWeights(log_before_K.exp(), (log_before_K + log_ratio_K).exp(), sequence_N)


def sampling_weights(tokens: Tokens) -> PrefixWeights:
    """Compute the weights W from the law q that drew the tokens to the policy of the tokens; exactly 1 if it drew them.

    Args:
        tokens: a block of sequences.

    Returns:
        W_k = Π_{j<k} π(a_j|s_j)/q(a_j|s_j) and so on.
    """
    if tokens.proposal_logprobs_K is not None:
        return prefix_weights(tokens.proposal_logprobs_K, tokens.logprobs_K, tokens.offsets_N1)
    ones_K = torch.ones(len(tokens.logprobs_K), dtype=torch.float64)
    return PrefixWeights(ones_K, ones_K, torch.ones(len(tokens.offsets_N1) - 1, dtype=torch.float64))


def log_weights_are_usable(weights: PrefixWeights) -> bool:
    """Return False if any weight over- or underflowed."""
    return bool(torch.isfinite(weights.after_K).all() and (weights.sequence_N > 0).all())
