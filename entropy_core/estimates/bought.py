"""Tokens of U that cost entropy and buy no reward: selected by one half of E, judged by the other.

Whether a token raises or lowers the expected reward is known with the noise of E, so tokens that are selected by what
they seem to do look better than they are. The half of E that selects is therefore not the one that judges; both halves
take both parts, and what is said is the mean of the two.
"""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.errors import StoreError

Bought = dict[str, Any]


def require_same_tokens(shares: pa.Table, attribution: pa.Table) -> None:
    """Raises StoreError where two tables with a row per token are of other sequences."""
    if shares["sequence_id"] != attribution["sequence_id"]:
        raise StoreError(
            f"the shares of {shares.num_rows} tokens are of others than the {attribution.num_rows} beside them",
            cause="artifacts of two batches were mixed, or the store was edited",
            fix="`entropy-probe store verify`, then run the sweep again",
        )


def bought(entropy_K: Tensor, reward_HK: Tensor) -> Bought:
    """Add up what the tokens do that lower the entropy and buy nothing.

    Args:
        entropy_K: what each token of U did to the entropy, nats, float64.
        reward_HK: what each did to the expected reward, by each half of E, float64 [2, K].

    Returns:
        `tokens`, the share of the tokens that lower the entropy and do not raise the reward by the half that selects;
        `entropy`, what these did to the entropy; `cost`, what all tokens that lower it did; `reward`, what the selected
        ones did to the expected reward by the half that judges; and `reward_of_all`, what all tokens did to it.
    """
    rows = []
    for selects, judges in ((0, 1), (1, 0)):
        chosen_K = (entropy_K < 0) & (reward_HK[selects] <= 0)
        sums = chosen_K.double().mean(), entropy_K[chosen_K].sum(), reward_HK[judges][chosen_K].sum()
        rows.append(torch.stack(sums))
    tokens, entropy, reward = torch.stack(rows).mean(0).tolist()
    cost = float(entropy_K.clamp_max(0).sum())
    return {
        "tokens": tokens,
        "entropy": entropy,
        "cost": cost,
        "reward": reward,
        "reward_of_all": float(reward_HK.mean(0).sum()),
    }
