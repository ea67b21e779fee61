"""The stages that need no policy. They are apart from the others because importing those takes seconds."""

from collections.abc import Callable, Sequence

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.runner import Inputs
from entropy_core.stages.agreement import agreement
from entropy_core.stages.interventions import interventions
from entropy_core.stages.phase import phase
from entropy_core.stages.post_mortem import post_mortem
from entropy_core.stages.price import price
from entropy_core.stages.rehearsal import rehearsal
from entropy_core.stages.report import report
from entropy_core.stages.variance import variance
from entropy_core.store.store import Stage

VARIANCE = Stage("variance", variance)
PRICE = Stage("price", price)
INTERVENTIONS = Stage("interventions", interventions)
PHASE = Stage("phase", phase)
REHEARSAL = Stage("rehearsal", rehearsal)
POST_MORTEM = Stage("post-mortem", post_mortem)
AGREEMENT = Stage("agreement", agreement)
REPORT = Stage("report", report)


def settings_of(config: ProbeConfig) -> Inputs:
    """Return the settings of the variance stage."""
    return config.variance.model_dump(mode="json", exclude={"cluster"}) | {"units": config.units_of_e}


def _from_recorded(
    entry: Inputs, config: ProbeConfig, of: str, inputs: Sequence[str], settings: Sequence[str]
) -> Inputs:
    return (
        {name: entry["inputs"][name] for name in inputs}
        | entry[of]
        | {name: getattr(config.variance, name) for name in settings}
        | {"units": config.units_of_e}
    )


_ESTIMATION = ("normalizations", "baseline", "confidence_level")


def _priced(entry: Inputs, config: ProbeConfig) -> Inputs:
    names = ("scores", "rescores", "first_order_e", "moved", "estimators")
    of_step = {"attribution": entry["inputs"]["first_order_u"], "learning_rate": entry["inputs"]["learning_rate"]}
    no_shares = {"shares": None}  # of a run that was recorded without
    return no_shares | of_step | _from_recorded(entry, config, "price", names, _ESTIMATION)


def _compared_interventions(entry: Inputs, config: ProbeConfig) -> Inputs:
    names = ("learning_rate", "scores", "first_order_e", "half_steps_u", "update")
    of_config = {"rewards": entry["price"].get("rewards", []), "margin": config.lab.margin}
    named = {name: entry[name] for name in ("checkpoint", "step")}
    return named | of_config | _from_recorded(entry, config, "interventions", names, _ESTIMATION)


def _along_the_phase(entry: Inputs, config: ProbeConfig) -> Inputs:
    names = ("scores", "rescores", "first_order_e", "learning_rate", "estimators")
    rewards = {"rewards": entry["price"].get("rewards", [])}
    return rewards | _from_recorded(entry, config, "phase", names, _ESTIMATION)


def _rehearsed(entry: Inputs, config: ProbeConfig) -> Inputs:
    floor = {"floor": config.lab.rehearse.floor}
    return floor | _from_recorded(entry, config, "rehearsal", (), ("normalizations", "confidence_level"))


def _dissected(entry: Inputs, config: ProbeConfig) -> Inputs:
    attribution = {"attribution": entry["inputs"]["first_order_u"]}
    names = ("scores", "first_order_e", "scores_u")
    return attribution | _from_recorded(entry, config, "post_mortem", names, ("normalizations", "baseline"))


ASKED_FOR: dict[str, tuple[Stage, Callable[[Inputs, ProbeConfig], Inputs]]] = {
    "price": (PRICE, _priced),
    "interventions": (INTERVENTIONS, _compared_interventions),
    "phase": (PHASE, _along_the_phase),
    "rehearsal": (REHEARSAL, _rehearsed),
    "post_mortem": (POST_MORTEM, _dissected),
}
"""The stages that run if they are asked for, by what is recorded of a checkpoint for each (empty if it was not), and
their inputs, from everything that is recorded of the checkpoint."""


def compared(recorded: Sequence[Inputs], config: ProbeConfig) -> Inputs:
    """Return the inputs of the agreement stage."""
    names = ("learning_rate", "scores", "scores_u", "update")
    e_split, u_split = config.splits
    return {
        "checkpoints": [
            {name: entry[name] for name in ("checkpoint", "step", "log")}
            | {name: entry["inputs"][name] for name in names}
            for entry in recorded
        ],
        "temperature": config.generation.temperature,
        "same_prompts": e_split == u_split and not config.generation.own_sampler,
    }
