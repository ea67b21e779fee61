"""Two checkpoints whose E and U come from the same random numbers, as by one seed: how their errors are related."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import uncertainty
from entropy_core.report import agreement
from oracle.counts import Counts
from oracle.replicas import Laboratory, Replica
from oracle.scenarios import PLAIN, Ready, moved_responses

APART = 10
"""Steps between the two checkpoints."""
AT_LEARNING_RATE = 1
"""Which row of a replication."""


class Pair(NamedTuple):
    """The same replication at both checkpoints."""

    first: Replica
    other: Replica


def pairs(replications: int, seed: int = 0) -> list[Pair]:
    """Replications of both."""
    ready = Ready(PLAIN)
    ready.generator.manual_seed(seed)
    lab, trainer = ready.laboratory, ready.trainer
    v_Q = lab.step(trainer, lab.draw_u(trainer, ready.generator)).v_Q
    later = moved_responses(copy.deepcopy(lab.exact.policy.model), lab.exact, APART * ready.learning_rate * v_Q)
    labs = lab, Laboratory(later, later, PLAIN.normalization)
    found = []
    for _ in range(replications):
        of_e = torch.rand(PLAIN.of_e, generator=ready.generator, dtype=torch.float64)
        prompts_P = torch.randint(PLAIN.prompts, (PLAIN.prompts_u,), generator=ready.generator)
        of_u = torch.rand(PLAIN.prompts_u, PLAIN.G, generator=ready.generator, dtype=torch.float64)
        both = []
        for one in labs:
            e_N = _inverse(one.law_R, of_e)
            in_prompt = one.law_PR / one.law_PR.sum(1, keepdim=True)
            u_PG = torch.stack([_inverse(in_prompt[p], u_G) for p, u_G in zip(prompts_P, of_u, strict=True)])
            both.append(one.rows(trainer, one.step(trainer, u_PG.flatten()), e_N, ready.learning_rate))
        found.append(Pair(*both))
    return found


def _inverse(law_R: Tensor, uniform: Tensor) -> Tensor:
    """Responses by inverse CDF; those to the same prompt are neighbours, and among them those of the same tokens."""
    return torch.searchsorted(law_R.cumsum(0), uniform).clamp_max(len(law_R) - 1)


def counted(found: list[Pair]) -> Counts:
    """Say how the errors of δH₁ are related, and how often ±1.96 SE of averages and differences hold.

    Returns:
        The correlation of the errors, and shares that hold the exact mean over U: of the average of both with errors
        that are added, of the same with errors taken as independent, and of the difference as the latter.
    """
    means = [sum(one[k].truth.first[AT_LEARNING_RATE] for one in found) / len(found) for k in (0, 1)]
    rows_2 = [[one[k].rows[AT_LEARNING_RATE] for one in found] for k in (0, 1)]
    error_2R = torch.tensor(
        [[row["delta_h1"] - mean for row in rows] for rows, mean in zip(rows_2, means, strict=True)]
    ).double()
    se_2R = torch.tensor([[agreement._of_mean_update(row) for row in rows] for rows in rows_2]).double()
    z = uncertainty.normal_quantile(0.95)

    def share(error_R: Tensor, se_R: Tensor) -> float:
        return float((error_R.abs() <= z * se_R).double().mean())

    independent_R = se_2R.square().sum(0).sqrt()
    return {
        "replications": len(found),
        "correlation": float(error_2R.corrcoef()[0, 1]),
        "average, added": share(error_2R.mean(0), se_2R.mean(0)),
        "average, independent": share(error_2R.mean(0), independent_R / 2),
        "difference, independent": share(error_2R[1] - error_2R[0], independent_R),
    }
