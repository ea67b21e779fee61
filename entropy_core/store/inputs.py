"""The types of what stages are given, and the check that a stage is given what it says.

An artifact's type is the stage that made it: a stage that reads the scores of E takes `ScoresOfE`, so that those of
U, or of anything else, are refused when a sweep is planned and not when their numbers are odd.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from entropy_core.store.artifact import Artifact

if TYPE_CHECKING:
    from entropy_core.store.store import Stage


_STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid")


def made_by(*stages: str) -> AfterValidator:
    """Refuse an artifact that none of these stages made."""

    def check(artifact: Artifact) -> Artifact:
        if artifact.stage not in stages:
            raise ValueError(f"an artifact of {artifact.stage}, not of {' or '.join(stages)}")
        return artifact

    return AfterValidator(check)


Prompts = Annotated[Artifact, made_by("load-prompts")]
Checkpoint = Annotated[Artifact, made_by("load-checkpoint")]
Weights = Annotated[Artifact, made_by("load-weights")]
Sequences = Annotated[Artifact, made_by("sample-e-batch", "sample-u-batch", "recorded-u-batch")]
SequencesOfE = Annotated[Artifact, made_by("sample-e-batch")]
SequencesOfU = Annotated[Artifact, made_by("sample-u-batch", "recorded-u-batch")]
Recorded = Annotated[Artifact, made_by("recorded-u-batch")]
ScoresOfE = Annotated[Artifact, made_by("score-e-batch")]
ScoresOfU = Annotated[Artifact, made_by("score-u-batch")]
ScoresOfReference = Annotated[Artifact, made_by("score-u-reference")]
Rescores = Annotated[Artifact, made_by("rescore-e-batch")]
Rewards = Annotated[Artifact, made_by("reward-u-batch", "recorded-u-batch")]
RewardsOfE = Annotated[Artifact, made_by("reward-e-batch")]
Discriminators = Annotated[Artifact, made_by("discriminate-u")]
Update = Annotated[Artifact, made_by("compute-update")]
PhaseStep = Annotated[Artifact, made_by("phase-step")]
RealStep = Annotated[Artifact, made_by("real-step")]
RehearsalStep = Annotated[Artifact, made_by("rehearsal-step")]
AnyStep = Annotated[Artifact, made_by("compute-update", "altered-step", "phase-step", "real-step")]
Sensitivities = Annotated[Artifact, made_by("half-sensitivities")]
Screen = Annotated[Artifact, made_by("screen")]
Predicted = Annotated[Artifact, made_by("predict")]
Gradient = Annotated[Artifact, made_by("entropy-gradient")]
RewardGradient = Annotated[Artifact, made_by("reward-gradient")]
RewardShares = Annotated[Artifact, made_by("reward-shares-u")]
Calibration = Annotated[Artifact, made_by("calibrate")]
AlongV = Annotated[Artifact, made_by("first-order-e")]
Attribution = Annotated[Artifact, made_by("first-order-u")]
HalfSteps = Annotated[Artifact, made_by("half-steps-u")]
MovedScores = Annotated[Artifact, made_by("importance")]
Path = Annotated[Artifact, made_by("path-integral")]
Estimates = Annotated[Artifact, made_by("variance")]
Interventions = Annotated[Artifact, made_by("interventions")]
Price = Annotated[Artifact, made_by("price")]
Phase = Annotated[Artifact, made_by("phase")]
Rehearsal = Annotated[Artifact, made_by("rehearsal")]
PostMortem = Annotated[Artifact, made_by("post-mortem")]
Agreement = Annotated[Artifact, made_by("agreement")]


@with_config(_STRICT)
class AtStepSize(TypedDict):
    """What was measured of E at one step size η; nothing at 0."""

    eta: float
    eta_over_lr: float
    shards: Sequence[MovedScores]
    path: Sequence[Path]


@with_config(_STRICT)
class MeasuredPhaseStep(TypedDict):
    """A step on the rollout, its number from 0, what was changed, and what was measured of E after it."""

    intervention: str
    number: int
    step: PhaseStep
    at: AtStepSize


@with_config(_STRICT)
class RehearsedPolicy(TypedDict):
    """A policy of a rehearsal on its E: after how many steps, under what, from which of the seeds, from 1."""

    intervention: str
    replicate: int
    number: int
    scores: Sequence[ScoresOfE]
    rewards: Sequence[RewardsOfE]


@with_config(_STRICT)
class PredictedIntervention(TypedDict):
    """What the exact step under one intervention does to first order."""

    label: str
    predicted: Predicted


@with_config(_STRICT)
class MeasuredIntervention(TypedDict):
    """What was measured of E after the step under one intervention."""

    label: str
    shards: Sequence[MovedScores]


@with_config(_STRICT)
class Replicate(TypedDict):
    """A further E."""

    seed: int
    scores: Sequence[ScoresOfE]
    first_order_e: Sequence[AlongV]


@with_config(_STRICT)
class TrainerLog(TypedDict):
    """What the trainer logged near a checkpoint; see `pipeline.trainer_log`."""

    entries: Sequence[dict[str, float]]
    prompts: int
    responses_per_prompt: int
    micro_batch: int
    top_p: float
    top_k: int


@with_config(_STRICT)
class LoggedCheckpoint(TypedDict):
    """What the probe measured of a checkpoint, and what is known of its trainer's log."""

    checkpoint: str
    step: int
    learning_rate: float
    scores: Sequence[ScoresOfE]
    scores_u: Sequence[ScoresOfU]
    update: Update
    log: TrainerLog


@with_config(_STRICT)
class ReportedCheckpoint(TypedDict):
    """What the report says of a checkpoint."""

    checkpoint: str
    step: int
    estimates: Estimates
    attribution: Attribution
    interventions: Interventions | None
    price: Price | None
    phase: Phase | None
    rehearsal: Rehearsal | None
    post_mortem: PostMortem | None


def require_inputs(stage: "Stage", inputs: Mapping[str, Any]) -> None:
    """Make sure that a stage is given its inputs, all of them and no others, each of its type.

    Args:
        stage: its function's keyword arguments say what it takes.
        inputs: by name.

    Raises:
        TypeError: an input is missing, unknown, or of another type; names it.
    """
    try:
        _adapter(stage.function).validate_python(dict(inputs))
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:4])
        raise TypeError(f"{stage.name} is not given what it takes: {said}") from None


@cache
def _adapter(function: Callable[..., Any]) -> TypeAdapter[Any]:
    names = {"Writer": Any, "Execution": Any} | globals()
    hints = get_type_hints(function, globalns=function.__globals__ | names, include_extras=True)
    arguments = function.__code__.co_varnames[2 : function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
    taken = TypedDict("taken", {name: hints.get(name, Any) for name in arguments})  # type: ignore[misc]
    return TypeAdapter(with_config(_STRICT)(taken))
