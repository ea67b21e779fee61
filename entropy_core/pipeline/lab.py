"""Try interventions on one checkpoint: screen all, take the exact steps, measure some, each cached on its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from entropy_core.config.schema import ProbeConfig
from entropy_core.losses.changed import AS_IT_IS
from entropy_core.losses.interventions import PUBLISHED, InterventionSpec, not_applicable
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.block_estimates import Blocks, derivative
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.specs import intervention_specs
from entropy_core.pipeline.stages_of import StagesOf
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact

BLOCKS = 16
"""Blocks of E: fifteen degrees of freedom for the error over E, and seven in the half that judges what was selected."""


class Batches(NamedTuple):
    """E and U of a checkpoint, in shards, and the number of responses of E to one prompt."""

    e: Sequence[Artifact]
    scores: Sequence[Artifact]
    u: Sequence[Artifact]
    scores_u: Sequence[Artifact]
    discriminators_u: Artifact
    together: int


class StepAsItIs(NamedTuple):
    """The step of the run without any intervention."""

    policy: PolicySpec
    checkpoint: Artifact
    update: Artifact
    gradient: Artifact
    first_order_u: Artifact
    learning_rate: float
    loss: LossSpec
    reward_gradient: Artifact | None = None


def tried(
    config: ProbeConfig,
    batches: Batches,
    step: StepAsItIs,
    stages: StagesOf,
    release: Callable[[Artifact], None],
) -> Inputs:
    """Run the stages of the interventions on one checkpoint.

    Args:
        config: which interventions, and what to do with each.
        batches: E and U.
        step: the step of the run.
        stages: runner of the stages of the checkpoint.
        release: called with an artifact when no stage will open its vectors any more.

    Returns:
        The inputs of the interventions stage that are its own.
    """
    specs = intervention_specs(config)
    of_u = {
        "checkpoint": step.checkpoint,
        "update": step.update,
        "scores_u": batches.scores_u,
        "discriminators_u": batches.discriminators_u,
    }
    along_halves = {"gradient": step.gradient, "first_order_u": step.first_order_u, "sequences": batches.u}
    of_both = {"policy": step.policy, "checkpoint": step.checkpoint, "update": step.update}
    of_u["sensitivities"] = stages.once(stage.HALF_SENSITIVITIES, of_both | along_halves)
    release(step.gradient)
    screened = stages.once(stage.SCREEN, of_u | {"interventions": specs})
    tried_specs = [AS_IT_IS, *(spec for spec in specs if not not_applicable(step.loss, spec))]
    predicted: list[Inputs] = []
    if config.lab.predict == "all":
        of_e = {"sequences": batches.e, "scores": batches.scores, "responses_per_prompt": batches.together}
        exact = of_u | of_e | {"policy": step.policy, "sequences_u": batches.u, "blocks": BLOCKS}
        exact["reward_gradient"] = step.reward_gradient
        together = in_groups(tried_specs)
        inputs = [exact | {"interventions": specs_of_one} for specs_of_one in together]
        artifacts = stages.each(stage.PREDICT, inputs, [_suffix(specs_of_one) for specs_of_one in together])
        by_label = {
            spec.label: artifact for of_one, artifact in zip(together, artifacts, strict=True) for spec in of_one
        }
        predicted = [{"label": spec.label, "predicted": by_label[spec.label]} for spec in tried_specs]
    if step.reward_gradient:
        release(step.reward_gradient)  # what is left needs only the steps
    altered = of_u | {"policy": step.policy, "sequences": batches.u}
    measured = []
    to_measure = chosen(config.lab.measure, tried_specs, screened, predicted)
    for spec in to_measure if len(to_measure) > 1 else ():
        label = f" · {spec.label}"
        moved_by = step.update
        if spec is not AS_IT_IS:
            moved_by = stages.once(stage.ALTERED_STEP, altered | {"intervention": spec}, label)
        moved = {"policy": step.policy, "update": moved_by, "eta": step.learning_rate}
        along = [moved | {"sequences": sequences} for sequences in batches.e]
        shards = stages.over_shards(stage.IMPORTANCE, along, label)
        measured.append({"label": spec.label, "shards": shards})
        if spec is not AS_IT_IS:
            release(moved_by)
    return {"screen": screened, "predicted": predicted, "measured": measured}


def in_groups(specs: Sequence[InterventionSpec]) -> list[list[InterventionSpec]]:
    """Say which interventions are predicted together, in one stage, where they share passes over U and over E.

    Those of `published` are, and the other named ones, so that one of these that is added leaves `published` in the
    store. A function of the user's is on its own: its file is what the user edits.
    """
    named = [spec for spec in specs if not spec.source]
    known = [spec for spec in named if spec == AS_IT_IS or (spec.name, spec.value) in PUBLISHED]
    others = [spec for spec in named if spec not in known]
    return [group for group in (known, others) if group] + [[spec] for spec in specs if spec.source]


def _suffix(specs: Sequence[InterventionSpec]) -> str:
    """Of the label of a stage that is about some interventions."""
    others = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
    return f" · {specs[0].label}{others}"


def chosen(
    asked: str, specs: Sequence[InterventionSpec], screened: Artifact, predicted: Sequence[Mapping[str, Any]]
) -> list[InterventionSpec]:
    """Choose the run as it is and the interventions that are asked for.

    Args:
        asked: all, none, or `best N`, those whose δH₁ is largest by the first half of E.
        specs: the run as it is, then the interventions.
        screened: artifact of screen.
        predicted: artifacts of predict, by the labels of the interventions; may be empty.
    """
    if asked == "all":
        return list(specs)
    first, *others = specs
    if asked == "none":
        return [first]
    count = int(asked.removeprefix("best "))
    by_label = {entry["label"]: entry["first_half"] for entry in screened.summary.get("interventions", ())}
    for entry in predicted:
        summary = entry["predicted"].summary
        if predictions := summary.get("predictions"):  # not in a dry run that would predict anew
            along_KB = torch.tensor(list(predictions[entry["label"]]["products"].values()), dtype=torch.float64)
            first_half = Blocks.from_summaries(summary["blocks"][::2])
            by_label[entry["label"]] = derivative(along_KB[:, ::2], first_half, "per_token").value
    others.sort(key=lambda spec: -by_label.get(spec.label, 0.0))
    return [first, *others[:count]]
