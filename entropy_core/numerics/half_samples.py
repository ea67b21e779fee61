"""Steps on halves of the update batch U: how the effect of a step varies with U, for the step as it is.

f = ⟨∇H, v⟩ is the effect of the step v on a batch of P prompts. v is no linear function of the gradient: clipping, and
second moments that have seen few gradients, bend it. So the step is taken again, on one half of the prompts of U and on
the other. The prompts of the two halves are independent, and with them f_A and f_B: (f_A − f_B)²/2 estimates without
bias the variance of f over batches of P/2 prompts, however nonlinear the step is.

How this variance goes from P/2 to P prompts is a matter of the step. A linear one halves it, and then (f_A + f_B)/2 is
exactly f. How far it is from f is `nonlinearity`, and the less linear the step is, the less of the factor 1/2 is relied
on. That these rules cover was found by simulation (tests/validation/test_09_intervals.py), not derived.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 8
"""Largest number of groups of prompts: a number of splits, and of degrees of freedom, of one less."""

LINEAR, BENT = 0.01, 0.05
"""`nonlinearity` up to which a step is linear as far as the variance over U is concerned, and from which the variance
of f over batches of P/2 prompts is used as it is for batches of P."""

FEWEST, FEWEST_BENT = 8, 16
"""Fewest prompts with unequal rewards for an interval over U, and for one where the step is not linear."""


def balanced_halves(prompts: int) -> Tensor:
    """Split the prompts of U in two halves, in several ways that are orthogonal to each other.

    The prompts are dealt to K groups, and the splits are the rows of a Hadamard matrix of order K without the first.
    Two halves of different splits share half of their groups, so that each split adds one degree of freedom to the
    variance of a linear f.

    Args:
        prompts: P.

    Returns:
        Whether a prompt is in the first half, bool [R, P]; R = K − 1 with K the largest power of two up to P and
        `GROUPS`. The halves of a split differ by at most K/2 prompts.
    """
    signs_KK = torch.ones(1, 1, dtype=torch.int64)
    while 2 * len(signs_KK) <= min(prompts, GROUPS):
        signs_KK = torch.cat([torch.cat([signs_KK, signs_KK], 1), torch.cat([signs_KK, -signs_KK], 1)])
    return signs_KK[1:, torch.arange(prompts) % len(signs_KK)] > 0


class HalfSteps(NamedTuple):
    """What the steps on halves of U say of the variance of f over U.

    Args:
        splits: R, the degrees of freedom of the variances.
        variance: of f over batches of P prompts if the step is linear in the gradient, else too small.
        variance_of_half: of f over batches of P/2 prompts, and so at least that over batches of P prompts.
        nonlinearity: mean square of (P_A f_A + P_B f_B)/P − f, relative to `variance`; 0 for a linear step.
        fresh: the optimizer has made no step yet.
        no_interval: why the optimizer's rule allows no interval over U; empty if it may.
    """

    splits: int
    variance: float
    variance_of_half: float
    nonlinearity: float
    fresh: bool = False
    no_interval: str = ""


def half_steps(
    value: float, halves_R2: Tensor, prompts_R2: Tensor, fresh: bool = False, no_interval: str = ""
) -> HalfSteps:
    """Estimate the variance of f over U from steps on halves of it.

    Args:
        value: f of the step on all of U.
        halves_R2: f of the steps on both halves of each split, float64 [R, 2].
        prompts_R2: number of prompts of each half, [R, 2].
        fresh: whether the optimizer has made no step yet.
        no_interval: why its rule allows no interval over U; empty if it may.

    Returns:
        The variances; NaN without a split.
    """
    if not len(halves_R2):
        return HalfSteps(0, float("nan"), float("nan"), float("nan"), fresh, no_interval)
    share_R2 = prompts_R2.double() / prompts_R2.sum(1, keepdim=True)
    squares_R = (halves_R2[:, 0] - halves_R2[:, 1]) ** 2
    variance = float((squares_R * _scale(prompts_R2)).mean())
    even_R = (halves_R2 * share_R2).sum(1) - value
    even = float((even_R**2).mean())
    nonlinearity = even / variance if variance > 0 else 0.0 if even == 0 else math.inf
    return HalfSteps(len(halves_R2), variance, float(squares_R.mean()) / 2, nonlinearity, fresh, no_interval)


class OverU(NamedTuple):
    """Standard error of f over U, its degrees of freedom, and the E×U interaction (a variance) that it contains.

    `invalid` says why there is no valid interval over U; empty if there is one.
    """

    standard_error: float
    degrees_of_freedom: int
    interaction: float
    invalid: str


def over_u(linearised: float, interaction: float, halves: HalfSteps, prompts: int, informative: int) -> OverU:
    """Choose the standard error over U: linearised for a linear step, else from the steps on halves of U.

    Args:
        linearised: standard error by the influence of each prompt on f, `uncertainty.clustered_sum_standard_error`.
        interaction: `uncertainty.interaction_variance`; used with `linearised`. Otherwise the interaction is counted
            twice, which makes the error too large.
        halves: the steps on halves of U.
        prompts: P.
        informative: number of prompts whose responses have unequal rewards.

    Returns:
        The standard error.
    """
    invalid = ""
    if informative < FEWEST:
        invalid = f"{informative} prompts of U have unequal rewards, and it takes {FEWEST}"
    elif not halves.splits:
        invalid = "in every split of U the loss of one half has no finite gradient"
    elif halves.fresh:  # a first step is nearly the sign of g: for some policies intervals of 95 % held in 89 %
        invalid = "the optimizer has made no step yet, and a first step depends on little but the signs of the gradient"
    elif halves.no_interval:
        invalid = halves.no_interval
    elif not halves.nonlinearity <= LINEAR and informative < FEWEST_BENT:
        invalid = f"the step is not linear in the gradient, and {informative} prompts, not {FEWEST_BENT}, inform it"
    elif math.isinf(halves.nonlinearity):
        invalid = "the steps on halves of U differ from the step, and not from each other"
    if halves.nonlinearity != halves.nonlinearity or halves.nonlinearity <= LINEAR or math.isinf(halves.nonlinearity):
        return OverU(linearised, prompts - 1, interaction, invalid)
    factor = 1.0 + min(1.0, halves.nonlinearity / BENT)
    return OverU((factor * halves.variance) ** 0.5, halves.splits, 0.0, invalid)


def _scale(prompts_R2: Tensor) -> Tensor:
    """P_A P_B/P², which makes (f_A − f_B)² the variance of the mean of P prompts, [R]."""
    return prompts_R2.double().prod(1) / prompts_R2.double().sum(1) ** 2
