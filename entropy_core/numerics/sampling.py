"""Sequences drawn by another law q than the policy π: how good the weights from q to π are, and whether q is right.

    W_k = Π_{j<k} π(a_j|s_j)/q(a_j|s_j)      W = W_{T+1}, the weight of a whole sequence

The recorded log q is correct only if E_q[W] = 1, and if the mean score E_q[Σ_k W_{k+1} ℓ̇_k] and the mean excess
surprisal E_q[Σ_k W_{k+1} (−ℓ_k − h_k)] are 0. They find different mistakes: if log π was recorded in place of log q,
all weights are 1, and only the other two are wrong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import importance, ragged
from entropy_core.numerics.functional import Tokens
from entropy_core.numerics.importance import LogTotals
from entropy_core.numerics.weights import sampling_weights


class Sampling(NamedTuple):
    """Of each sequence, float64 [N]: W, Σ_k W_{k+1} ℓ̇_k and Σ_k W_{k+1} (−ℓ_k − h_k); and totals over all of them."""

    weights_N: Tensor
    score_N: Tensor
    surprisal_N: Tensor
    log_totals: LogTotals
    difference_sum: float  # Σ |ℓ − log q| over the tokens
    largest_difference: float
    tokens: int

    @classmethod
    def of(cls, tokens: Tokens) -> "Sampling":
        """Of a block of sequences with derivatives."""
        weights, offsets_N1 = sampling_weights(tokens), tokens.offsets_N1
        difference_K = (tokens.logprobs_K.double() - tokens.drawn_logprobs_K.double()).abs()
        return cls(
            weights.sequence_N,
            ragged.sequence_sum(weights.after_K * tokens.derivative.logprob_K, offsets_N1),
            -ragged.sequence_sum(weights.after_K * (tokens.logprobs_K.double() + tokens.entropies_K), offsets_N1),
            importance.log_totals(weights, offsets_N1),
            float(difference_K.sum()),
            float(difference_K.max()),
            len(difference_K),
        )

    def plus(self, other: "Sampling") -> "Sampling":
        """Return the same of the sequences of both blocks, in this order."""
        return Sampling(
            torch.cat([self.weights_N, other.weights_N]),
            torch.cat([self.score_N, other.score_N]),
            torch.cat([self.surprisal_N, other.surprisal_N]),
            self.log_totals.plus(other.log_totals),
            self.difference_sum + other.difference_sum,
            max(self.largest_difference, other.largest_difference),
            self.tokens + other.tokens,
        )

    @property
    def ess_prefix(self) -> float:
        """Smallest effective sample size of the prefix weights at any position."""
        return float(importance.prefix_effective_sample_sizes(self.log_totals).min())
