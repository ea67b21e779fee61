"""The law that draws E in place of the policy: a mixture with a broader law."""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged


class Proposal(NamedTuple):
    """A law q that draws E: each response comes from the sampler's policy, or from the same at another temperature.

    A response t has the probability (1 − share)·π(t) + share·π_τ'(t), so its weight is at most 1/(1 − share) however
    long it is: a defensive mixture (Hesterberg, "Weighted average importance sampling and defensive mixture
    distributions", Technometrics 37(2), 1995).
    """

    temperature: float  # τ' of the broad component
    share: float  # of responses that come from it, between 0 and 1

    def logprobs(self, policy_K: Tensor, broad_K: Tensor, offsets_N1: Tensor) -> Tensor:
        """Compute log q(a_k|s_k) of each token from its log-probabilities under the two components.

        Args:
            policy_K: log π(a_k|s_k), nats, [K].
            broad_K: log π_τ'(a_k|s_k), nats, [K].
            offsets_N1: int64 [N + 1].

        Returns:
            float64 [K]; within a response they add up to the log-probability of the mixture.
        """
        shares = torch.tensor([1.0 - self.share, self.share], dtype=torch.float64).log()
        columns = policy_K.double(), broad_K.double()
        before_2K = torch.stack([ragged.sum_before(column_K, offsets_N1) for column_K in columns])
        prior_2K = (shares.unsqueeze(1) + before_2K).log_softmax(0)  # which component the prefix came from
        return torch.logsumexp(prior_2K + torch.stack(columns), 0)
