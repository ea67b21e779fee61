"""Try interventions on one checkpoint: screen all, take the exact steps, measure some, each cached on its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from entropy_core.config.schema import ProbeConfig
from entropy_core.files import functions as user_functions
from entropy_core.files.sources import content_digest
from entropy_core.losses import token_weights
from entropy_core.losses.changed import AS_IT_IS
from entropy_core.losses.interventions import InterventionSpec, asked_for, is_own, not_applicable
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.halves import by_normalization
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.runner import Inputs, Runner
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
    learning_rate: float
    loss: LossSpec
    reward_gradient: Artifact | None = None


def specs_of(config: ProbeConfig) -> list[InterventionSpec]:
    """Return the interventions that a configuration asks for, each once."""
    found = []
    for entry in config.interventions:
        for name, value in asked_for(entry):
            file = token_weights.source_file(name) if is_own(name) else None
            found.append(
                InterventionSpec(
                    name=user_functions.without_folder(name),
                    value=value,
                    source=content_digest(file) if file else "",
                    imports={of: content_digest(path) for of, path in user_functions.imported_files(file).items()}
                    if file
                    else {},
                    seed=config.batch_config.U_batch_seed,
                )
            )
    return list({spec.label: spec for spec in found}.values())


def tried(
    config: ProbeConfig,
    batches: Batches,
    step: StepAsItIs,
    run: Runner,
    name: str,
    release: Callable[[Artifact], None],
) -> Inputs:
    """Run the stages of the interventions on one checkpoint.

    Args:
        config: which interventions, and what to do with each.
        batches: E and U.
        step: the step of the run.
        run: runner of stages.
        name: of the checkpoint.
        release: called with an artifact when no stage will open its vectors any more.

    Returns:
        The inputs of the interventions stage that are its own.
    """
    specs = specs_of(config)
    of_u = {
        "checkpoint": step.checkpoint,
        "update": step.update,
        "scores_u": batches.scores_u,
        "discriminators_u": batches.discriminators_u,
    }
    of_both = {"policy": step.policy, "checkpoint": step.checkpoint, "update": step.update}
    of_e = {"sequences": batches.e, "scores": batches.scores, "responses_per_prompt": batches.together}
    sensitivities = run(stage.BLOCK_SENSITIVITIES, of_both | of_e | {"sequences_u": batches.u, "blocks": BLOCKS}, name)
    of_u["sensitivities"] = sensitivities
    screened = run(stage.SCREEN, of_u | {"interventions": specs}, name)
    tried_specs = [AS_IT_IS, *(spec for spec in specs if not not_applicable(step.loss, spec))]
    exact = of_u | {"policy": step.policy, "sequences": batches.u}
    predicted: list[Inputs] = []
    if config.lab.predict == "all":
        gradients = {"gradient": step.gradient, "reward_gradient": step.reward_gradient}
        inputs = [exact | gradients | {"intervention": spec} for spec in tried_specs]
        artifacts = run.map(stage.PREDICT, inputs, [f"{name} · {spec.label}" for spec in tried_specs])
        predicted = [
            {"label": spec.label, "predicted": artifact} for spec, artifact in zip(tried_specs, artifacts, strict=True)
        ]
    for gradient in filter(None, (step.gradient, step.reward_gradient)):  # what is left needs only the steps
        release(gradient)
    measured = []
    for spec in _to_measure(config.lab.measure, tried_specs, screened, predicted):
        label = f"{name} · {spec.label}"
        moved_by = step.update
        if spec is not AS_IT_IS:
            moved_by = run(stage.ALTERED_STEP, exact | {"intervention": spec}, label)
        moved = {"policy": step.policy, "update": moved_by, "eta": step.learning_rate}
        labels = [f"{label} · shard {i}/{len(batches.e)}" for i in range(1, len(batches.e) + 1)]
        shards = run.map(stage.IMPORTANCE, [moved | {"sequences": sequences} for sequences in batches.e], labels)
        measured.append({"label": spec.label, "shards": shards})
        if spec is not AS_IT_IS:
            release(moved_by)
    return {"screen": screened, "predicted": predicted, "measured": measured}


def _to_measure(
    asked: str, specs: Sequence[InterventionSpec], screened: Artifact, predicted: Sequence[Mapping[str, Any]]
) -> list[InterventionSpec]:
    """The run as it is, and those asked for: the best are those whose δH₁ is largest by the first half of E."""
    if asked == "none" or len(specs) == 1:
        return []
    if asked == "all":
        return list(specs)
    first, *others = specs
    count = int(asked.removeprefix("best "))
    by_label = {entry["label"]: entry["first_half"] for entry in screened.summary.get("interventions", ())}
    half: dict[str, float] = screened.summary.get("first_half", {})  # empty in a dry run that would screen anew
    for entry in predicted if half else ():
        if products := entry["predicted"].summary.get("products"):
            along = [of_kind[0] for of_kind in products.values()]
            by_label[entry["label"]] = by_normalization(along, half["H_tok"], half["mean_length"])["per_token"]
    others.sort(key=lambda spec: -by_label.get(spec.label, 0.0))
    return [first, *others[:count]]
