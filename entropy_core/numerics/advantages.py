"""Advantages A_i of the responses to one prompt, computed from their rewards r_i alone.

| loss       | A_i                                             | source                  |
|------------|-------------------------------------------------|-------------------------|
| grpo, …    | (r_i − mean)/(std + 1e-4), std with G − 1       | arXiv:2402.03300        |
| dr_grpo    | r_i − mean                                      | arXiv:2503.20783        |
| rloo       | r_i − mean of the other responses of the prompt | arXiv:2402.14740        |
| reinforce  | r_i                                             | Williams 1992           |

dapo, bnpo, luspo and cispo use the rule of grpo. Trainers also let the user choose the divisor independently of the
loss (`scale_rewards` in TRL): the standard deviation of the group, that of all rewards in the batch, or no division.
The losses themselves are in `losses`.

Several rewards make one number, as in TRL: the weighted sum (sum_then_normalize), or the weighted sum of rewards that
were each normalised within their group, standardised over the batch in the place of the table (normalize_then_sum). A
reward that a function left open is NaN: it has no part in a sum, a mean or a standard deviation, and a response without
any reward has advantage 0.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "rloo", "reinforce"]
Scaling = Literal["auto", "group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
STD_EPSILON = 1e-4  # as in TRL's GRPOTrainer


def group_advantages(rewards_PG: Tensor, loss: str, scaling: Scaling = "auto") -> Tensor:
    """Compute the advantage of each response among the responses to its prompt.

    Args:
        rewards_PG: float64 [P, G], G ≥ 2; NaN for a response without a reward.
        loss: a `Loss`, which selects the rule.
        scaling: divisor of the advantages: the std of their `group` + 1e-4, the std of the whole `batch` + 1e-4, or
            `none`; `auto` follows the table.

    Returns:
        float64 [P, G]; exactly zero for a group of equal rewards, except under `reinforce`; NaN where there is no
        reward, or no other one to compare it with.

    Raises:
        ValueError: fewer than two responses per prompt, or an unknown loss.
    """
    G = rewards_PG.shape[1]
    if G < 2:
        raise ValueError(f"advantages within a group need at least two responses per prompt, got {G}")
    if loss not in get_args(Loss):
        raise ValueError(f"unknown loss {loss!r}")
    centred_PG, counts_P1 = _centred(rewards_PG), (~rewards_PG.isnan()).to(rewards_PG.dtype).sum(dim=1, keepdim=True)
    rule = {"rloo": centred_PG * (counts_P1 / (counts_P1 - 1)), "reinforce": rewards_PG}
    advantages_PG, divided = rule.get(loss, centred_PG), divided_by(loss, scaling)
    if divided == "group":
        return advantages_PG / (_std(rewards_PG, 1) + STD_EPSILON)
    return advantages_PG / (_std(rewards_PG.flatten(), 0) + STD_EPSILON) if divided == "batch" else advantages_PG


def standardised(advantages_PG: Tensor) -> Tensor:
    """Advantages less their mean over the batch, over their standard deviation + 1e-4; NaN has no part in either."""
    return (advantages_PG - advantages_PG.nanmean()) / (_std(advantages_PG.flatten(), 0) + STD_EPSILON)


def weighted_sum(rewards_NF: Tensor, weights_F: Tensor) -> Tensor:
    """Σ_f w_f·r_f over the rewards that a response has.

    Args:
        rewards_NF: float64 [N, F], of F functions; NaN where one left it open.
        weights_F: float64 [F].

    Returns:
        float64 [N]; NaN where every function left it open.
    """
    total_N = (rewards_NF * weights_F).nansum(dim=1)
    return total_N.masked_fill(rewards_NF.isnan().all(dim=1), torch.nan)


def normalised_within_groups(rewards_NF: Tensor, G: int) -> Tensor:
    """(r − mean)/(std + 1e-4) of each function among the G responses to a prompt; float64 [N, F], NaN where open."""
    rewards_PGF = rewards_NF.view(-1, G, rewards_NF.shape[1])
    return (_centred(rewards_PGF) / (_std(rewards_PGF, 1) + STD_EPSILON)).view_as(rewards_NF)


def groups_of_equal(rewards_PG: Tensor) -> int:
    """How many groups have no two rewards that differ, so that they say nothing about the policy."""
    open_PG = rewards_PG.isnan()
    least_P = rewards_PG.masked_fill(open_PG, torch.inf).amin(dim=1)
    most_P = rewards_PG.masked_fill(open_PG, -torch.inf).amax(dim=1)
    return int((least_P >= most_P).sum())


def _centred(rewards_PG: Tensor) -> Tensor:
    """Less the mean of the group; exactly 0 where it has equal rewards, however their mean is rounded.

    The mean of equal numbers can differ from them by a rounding error, which a division would amplify.
    """
    centred_PG, open_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True), rewards_PG.isnan()
    most_P1 = rewards_PG.masked_fill(open_PG, -torch.inf).amax(dim=1, keepdim=True)
    least_P1 = rewards_PG.masked_fill(open_PG, torch.inf).amin(dim=1, keepdim=True)
    return centred_PG.masked_fill((most_P1 == least_P1) & ~open_PG, 0.0)


def _std(values: Tensor, dim: int) -> Tensor:
    """Standard deviation of what is not NaN, with n − 1; NaN of fewer than two; the dimension is kept."""
    deviations = values - values.nanmean(dim=dim, keepdim=True)
    counts = (~values.isnan()).sum(dim=dim, keepdim=True)
    variance = deviations.square().nansum(dim=dim, keepdim=True) / (counts - 1)
    return torch.where(counts > 1, variance, torch.nan).sqrt()


def divided_by(loss: str, scaling: Scaling) -> Literal["group", "batch", "none"]:
    """The standard deviation that advantages are divided by, `auto` resolved."""
    if scaling == "auto":
        return "none" if loss in ("dr_grpo", "rloo", "reinforce") else "group"
    return scaling
