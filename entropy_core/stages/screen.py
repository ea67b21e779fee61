"""screen: δH₁ under every intervention, with frozen denominators, from the sensitivities of U on both halves of E."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.losses.changed import AS_IT_IS, changed_by, excess_of, influences_of, read_sensitivities
from entropy_core.losses.interventions import ON_HALF_OF_E, InterventionSpec, altered, not_applicable
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.adamw import AdamHyperparameters, clip_factor
from entropy_core.numerics.altered_optimizer import Altered, Factors, kept_on, step_factors
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization
from entropy_core.numerics.rules import RULES

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Discriminators, ScoresOfU, Sensitivities, Update


def screen(
    out: "Writer",
    execution: "Execution",
    *,
    checkpoint: "Checkpoint",
    update: "Update",
    scores_u: "Sequence[ScoresOfU]",
    discriminators_u: "Discriminators",
    sensitivities: "Sensitivities",
    interventions: Sequence[InterventionSpec],
) -> dict[str, Any]:
    """Compute ⟨∇H, v'⟩ of every intervention on each half of E. Costs dot products, and needs no policy.

    The denominators of the optimizer and the clip factor stay those of the run, unless the intervention sets it.

    Args:
        out: `screen.safetensors`: `product` and `kept_on` (⟨∇, v'⟩ of the first step, and of the step once momentum is
            that of the changed gradient), `gradient` (the part of the gradient in `product`; all of them [I, kinds,
            halves], NaN where the screen cannot tell) and `influence` (of each prompt of U on `product`, [I, kinds,
            halves, P]). The first intervention is none.
        execution: how functions of the user are called.
        checkpoint: artifact of load-checkpoint, for hyperparameters.
        update: artifact of compute-update, of which no vector is read.
        scores_u: shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        sensitivities: artifact of half-sensitivities.
        interventions: what is tried.

    Returns:
        `interventions`: for each its label, whether it is judged on the second half of E only, the factor of the
        gradient's part once the momentum is saturated, the clip factor that is taken, and ⟨∇H_tok, v'⟩ by the first
        half, 0 where the screen cannot tell; `skipped`: what cannot be tried, and why; and `halves`, as of
        half-sensitivities.
    """
    halves, of_u = sensitivities.summary["halves"], read_sensitivities(sensitivities)
    table, excess_K = excess_of(scores_u, discriminators_u)
    rules = {group["rule"] for group in checkpoint.json("groups.json")}
    groups = _groups(checkpoint) if rules == {"adamw"} else None
    spec = LossSpec(**update.summary["loss"])
    in_halves = [pair for pairs in of_u.values() for pair in pairs]
    asked = [AS_IT_IS, *interventions]
    reasons = [not_applicable(spec, one) or _not_adamw(altered(one), rules) for one in asked]
    named = [(one.label, reason) for one, reason in zip(asked, reasons, strict=True)]
    skipped = [{"intervention": label, "reason": reason} for label, reason in named if reason]
    applicable = [one for one, reason in zip(asked, reasons, strict=True) if not reason]
    changes = changed_by(applicable, execution, update, table, excess_K, sensitivities)
    tried: list[dict[str, Any]] = []
    products: list[Tensor] = []
    kept: list[Tensor] = []
    gradients: list[Tensor] = []
    influences: list[Tensor] = []
    for intervention, changed in zip(applicable, changes, strict=True):
        factors = _factors(changed.altered, groups, update.summary)
        saturated = kept_on([(changed.altered.of(group), t) for group, t in groups]) if groups else None
        of_kinds: list[list[Tensor]] = [[], [], []]
        for kind in KINDS:
            gradient_H = torch.stack([changed.coefficients.dot(pair).sum() for pair in of_u[kind]])
            parts = [half[kind] for half in halves]
            of_kinds[0].append(_of_halves(gradient_H, parts, factors))
            of_kinds[1].append(_of_halves(gradient_H, parts, _saturated(factors, saturated)))
            of_kinds[2].append(gradient_H * (factors.gradient if factors else torch.nan))
        for into, of_kind in zip((products, kept, gradients), of_kinds, strict=True):
            into.append(torch.stack(of_kind))
        prompts = update.summary["prompts"]
        of_pairs = [x_N.view(prompts, -1).sum(1) for x_N in influences_of(changed, in_halves, execution)]
        gradient = factors.gradient if factors else torch.nan
        influences.append(gradient * torch.stack(of_pairs).view(len(KINDS), len(HALVES), -1))
        on_first = by_normalization(list(products[-1][:, 0]), halves[0]["H_tok"], halves[0]["mean_length"])
        first_half = float(on_first["per_token"])
        tried.append(
            {
                "label": intervention.label,
                "on_second_half": intervention.name in ON_HALF_OF_E,
                "kept_on": saturated,
                "clip_factor": _clip_factor(changed.altered, update.summary),
                "first_half": 0.0 if math.isnan(first_half) else first_half,
            }
        )
    columns = {"product": products, "gradient": gradients, "kept_on": kept, "influence": influences}
    out.tensors({name: torch.stack(column) for name, column in columns.items()}, "screen.safetensors")
    return {"interventions": tried, "skipped": skipped, "halves": halves}


def _groups(checkpoint: "Checkpoint") -> list[tuple[AdamHyperparameters, int]]:
    """The hyperparameters of each parameter group, and the number of the step."""
    found = []
    for group in checkpoint.json("groups.json"):
        steps = {of_one[0] for of_one in group["parameters"].values()}
        found += [(AdamHyperparameters(**group["hyperparameters"]), taken + 1) for taken in sorted(steps)]
    return found


def _not_adamw(altered: Altered, rules: set[str]) -> str:
    """Why the optimizer has no such hyperparameter; empty if it has."""
    if not altered.of_adamw or rules == {"adamw"}:
        return ""
    return f"it is defined for AdamW, and the optimizer is {', '.join(sorted(RULES[rule].name for rule in rules))}"


def _factors(
    altered: Altered, groups: Sequence[tuple[AdamHyperparameters, int]] | None, update: dict[str, Any]
) -> Factors | None:
    """Factors of the parts of the step; None where the screen cannot tell."""
    factors = step_factors(altered, groups) if groups else Factors().times(altered.learning_rate)
    if factors is None or altered.max_grad_norm is None:
        return factors
    return factors._replace(gradient=factors.gradient * _clip_factor(altered, update) / update["clip_factor"])


def _clip_factor(altered: Altered, update: dict[str, Any]) -> float:
    """The clip factor that the screen takes: that of the gradient of the run."""
    if altered.max_grad_norm is None:
        return float(update["clip_factor"])
    return clip_factor(update["gradient_norm"], altered.max_grad_norm)


def _saturated(factors: Factors | None, saturated: float | None) -> Factors | None:
    if factors is None or saturated is None:
        return None
    return factors._replace(gradient=factors.gradient * saturated, momentum=0.0)


def _of_halves(gradient_H: Tensor, halves: Sequence[dict[str, float]], factors: Factors | None) -> Tensor:
    """⟨∇, v'⟩ on each half, float64 [halves]."""
    if factors is None:
        return torch.full_like(gradient_H, torch.nan)
    total_H = factors.gradient * gradient_H
    for part in ("momentum", "decay", "rounding"):
        of_part_H = torch.tensor([half[part] for half in halves], dtype=torch.float64)
        total_H = total_H + getattr(factors, part) * of_part_H
    return total_H
