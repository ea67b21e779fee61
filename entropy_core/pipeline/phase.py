"""Follow the phase of a rollout on one checkpoint: its optimizer steps, each keyed by the last, and E after each."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from entropy_core.config.schema import ProbeConfig
from entropy_core.losses.changed import AS_IT_IS
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.phase_interventions import CLIPPING, asked_in_phase, changed_phase
from entropy_core.numerics.choices import Arithmetic, Estimator
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.specs import phase_spec
from entropy_core.pipeline.stages_of import StagesOf
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact


class OnE(NamedTuple):
    """How E is measured after a step: its shards and their scores, the nominal learning rate, the estimator of ΔH."""

    shards: Sequence[Artifact]
    scores: Sequence[Artifact]
    learning_rate: float
    estimator: Estimator
    arithmetic: Arithmetic


def followed(
    config: ProbeConfig,
    of_rollout: Inputs,
    on_e: OnE,
    learning_rates: Sequence[float],
    stages: StagesOf,
    release: Callable[[Artifact], None],
) -> Inputs:
    """Take the steps and score E after each of them.

    Args:
        config: how a rollout is cut, and how often.
        of_rollout: the policy, load-checkpoint, the sequences of U, and compute-update, which has the loss at the
            rollout.
        on_e: how E is measured.
        learning_rates: of the steps, over that of the first.
        stages: runner of the stages of the checkpoint.
        release: called with an artifact when no stage will open its vectors any more.

    Returns:
        The inputs of the phase stage that are its own; none if the phase is not followed.
    """
    phase = config.update.phase
    if not phase.steps:
        return {}
    spec = phase_spec(config)
    pairs, seed = map(asked_in_phase, phase.interventions), config.batch_config.U_batch_seed
    taken: list[Inputs] = []
    for one in [None, *(InterventionSpec(name=name, value=value, seed=seed) for name, value in pairs)]:
        how = of_rollout | {"phase": changed_phase(spec, one) if one else spec}
        how["intervention"] = None if one and one.name in CLIPPING else one
        label = f" · {one.label}" if one else ""
        taken += [
            {"intervention": (one or AS_IT_IS).label, **entry}
            for entry in _steps(how, learning_rates, on_e, stages, label, release)
        ]
    return {"steps": taken, "minibatches": phase.minibatches}


def _steps(
    how: Inputs,
    learning_rates: Sequence[float],
    on_e: OnE,
    stages: StagesOf,
    of: str,
    release: Callable[[Artifact], None],
) -> Iterator[Inputs]:
    """Take a step with each learning rate, each after the last, and measure E after each."""
    previous: Artifact | None = None
    for number, rate in enumerate(learning_rates):
        label = f"{of} · step {number + 1}/{len(learning_rates)} of the phase"
        asked = how | {"previous": previous, "number": number, "rate": rate}
        now = stages.once(stage.PHASE_STEP, asked, label)
        if previous is not None:
            release(previous)
        yield {"number": number, "step": now, "at": _measured(how["policy"], on_e, now, stages, label)}
        previous = now
    if previous is not None:
        release(previous)


def _measured(policy: PolicySpec, on_e: OnE, now: Artifact, stages: StagesOf, label: str) -> Inputs:
    """E at the policy after a step."""
    by_path = on_e.estimator == "path_integral"
    moved = {"policy": policy, "update": now, "eta": on_e.learning_rate}
    inputs = [moved | {"sequences": sequences} for sequences in on_e.shards]
    if by_path:
        inputs = [i | {"scores": at, "arithmetic": on_e.arithmetic} for i, at in zip(inputs, on_e.scores, strict=True)]
    shards = stages.over_shards(stage.PATH_INTEGRAL if by_path else stage.IMPORTANCE, inputs, label)
    empty: list[Artifact] = []
    at_step = {"shards": empty, "path": shards} if by_path else {"shards": shards, "path": empty}
    return {"eta": on_e.learning_rate, "eta_over_lr": 1.0, **at_step}
