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
"""

from typing import Literal, get_args

from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "rloo", "reinforce"]
Scaling = Literal["auto", "group", "batch", "none"]
STD_EPSILON = 1e-4  # as in TRL's GRPOTrainer


def group_advantages(rewards_PG: Tensor, loss: str, scaling: Scaling = "auto") -> Tensor:
    """Compute the advantage of each response among the responses to its prompt.

    Args:
        rewards_PG: float64 [P, G], G ≥ 2.
        loss: a `Loss`, which selects the rule.
        scaling: divisor of the advantages: the std of their `group` + 1e-4, the std of the whole `batch` + 1e-4, or
            `none`; `auto` follows the table.

    Returns:
        float64 [P, G]; exactly zero for a group of equal rewards, except under `reinforce`.

    Raises:
        ValueError: fewer than two responses per prompt, or an unknown loss.
    """
    G = rewards_PG.shape[1]
    if G < 2:
        raise ValueError(f"advantages within a group need at least two responses per prompt, got {G}")
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # the mean of equal numbers can differ from them by a rounding error, which the division would amplify
    equal_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
    centred_PG = centred_PG.masked_fill(equal_P1, 0.0)
    if loss not in get_args(Loss):
        raise ValueError(f"unknown loss {loss!r}")
    rule = {"rloo": centred_PG * (G / (G - 1)), "reinforce": rewards_PG}
    advantages_PG, divided = rule.get(loss, centred_PG), divided_by(loss, scaling)
    if divided == "group":
        return advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + STD_EPSILON)
    return advantages_PG / (rewards_PG.std() + STD_EPSILON) if divided == "batch" else advantages_PG


def standardised(advantages_PG: Tensor) -> Tensor:
    """Advantages less their mean over the batch, over their standard deviation + 1e-4."""
    return (advantages_PG - advantages_PG.mean()) / (advantages_PG.std() + STD_EPSILON)


def divided_by(loss: str, scaling: Scaling) -> Literal["group", "batch", "none"]:
    """The standard deviation that advantages are divided by, `auto` resolved."""
    if scaling == "auto":
        return "none" if loss in ("dr_grpo", "rloo", "reinforce") else "group"
    return scaling
