"""What trainers do about responses that an older policy drew: clip the ratio ρ = π/π_old, and leave responses out.

    A > 0    ρ is cut at 1 + ε_high
    A < 0    ρ is cut at 1 − ε, and with the dual clip at δ from above

This is −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)·A) of PPO (arXiv:1707.06347) with the two bounds of DAPO (arXiv:2503.14476)
and the dual clip of arXiv:1912.09729, which TRL calls two-sided. A token that is cut has no gradient. On-policy, where
every ρ is 1, nothing is cut.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class OffPolicy:
    """Settings that act on responses of an older policy, with TRL's names.

    Args:
        epsilon: ε, how far below 1 the ratio of a token with A < 0 counts.
        epsilon_high: ε_high, how far above 1 the ratio of a token with A > 0 counts.
        delta: δ, above which the ratio of a token with A < 0 counts no further; None for no dual clip.
        off_policy_mask_threshold: a response with A < 0 is left out of the policy term where the mean of ℓ_old − ℓ over
            its tokens is larger, nats (arXiv:2512.02556); None for no mask.
    """

    epsilon: float
    epsilon_high: float
    delta: float | None = None
    off_policy_mask_threshold: float | None = None


class Clipped(NamedTuple):
    """Which ratios are cut: from below, from above, and by the dual clip; bool, any shape."""

    low: Tensor
    high: Tensor
    dual: Tensor

    @property
    def any(self) -> Tensor:
        """Whether the ratio is cut at all."""
        return self.low | self.high | self.dual


def clipped_ratio(ratio: Tensor, advantages: Tensor, rule: OffPolicy) -> Tensor:
    """Return the ratio that multiplies the advantage in the loss.

    Args:
        ratio: ρ, any shape; differentiable.
        advantages: A, same shape.
        rule: the bounds.

    Returns:
        The ratio, constant where it is cut.
    """
    highest = 1.0 + rule.epsilon_high
    above, below = highest if rule.delta is None else min(highest, rule.delta), ratio.clamp_min(1.0 - rule.epsilon)
    if rule.delta is not None:
        below = below.clamp_max(max(highest, rule.delta))
    return torch.where(advantages > 0, ratio.clamp_max(above), below)


def clipped(ratio: Tensor, advantages: Tensor, rule: OffPolicy) -> Clipped:
    """Say which ratios `clipped_ratio` cuts; takes the same arguments."""
    high = (ratio > 1.0 + rule.epsilon_high) & (advantages > 0)
    low = (ratio < 1.0 - rule.epsilon) & (advantages < 0)
    if rule.delta is None:
        return Clipped(low, high, torch.zeros_like(low))
    highest = max(rule.delta, 1.0 + rule.epsilon_high)
    return Clipped(low, high | ((ratio > rule.delta) & (advantages > 0)), (ratio > highest) & (advantages < 0))


def kept_responses(mean_drift_N: Tensor, advantages_N: Tensor, threshold: float) -> Tensor:
    """Say which responses keep their policy term: those with A ≥ 0, and those that the policy has not left.

    Args:
        mean_drift_N: mean of ℓ_old − ℓ over the tokens of each response, nats, [N].
        advantages_N: A, [N].
        threshold: largest drift of a response with A < 0, nats.

    Returns:
        bool [N].
    """
    return (advantages_N >= 0) | (mean_drift_N <= threshold)
