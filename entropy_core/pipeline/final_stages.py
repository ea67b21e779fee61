"""The stages that need no policy. They are apart from the others because importing those takes seconds."""

from collections.abc import Sequence

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.runner import Inputs
from entropy_core.stages.agreement import agreement
from entropy_core.stages.interventions import interventions
from entropy_core.stages.post_mortem import post_mortem
from entropy_core.stages.price import price
from entropy_core.stages.report import report
from entropy_core.stages.variance import variance
from entropy_core.store.store import Stage

VARIANCE = Stage("variance", variance)
PRICE = Stage("price", price)
INTERVENTIONS = Stage("interventions", interventions)
POST_MORTEM = Stage("post-mortem", post_mortem)
AGREEMENT = Stage("agreement", agreement)
REPORT = Stage("report", report)


def settings_of(config: ProbeConfig) -> Inputs:
    """Return the settings of the variance stage."""
    return config.variance.model_dump(mode="json", exclude={"cluster"}) | {"units": config.units_of_e}


def priced(entry: Inputs, config: ProbeConfig) -> Inputs:
    """Return the inputs of the price stage, from what is recorded of a checkpoint whose E has rewards."""
    names = ("scores", "rescores", "first_order_e", "moved", "estimators")
    return (
        {name: entry["inputs"][name] for name in names}
        | {"shares": None}  # of a run that was recorded without
        | entry["price"]
        | {"attribution": entry["inputs"]["first_order_u"], "learning_rate": entry["inputs"]["learning_rate"]}
        | {name: getattr(config.variance, name) for name in ("normalizations", "baseline", "confidence_level")}
        | {"units": config.units_of_e}
    )


def dissected(entry: Inputs, config: ProbeConfig) -> Inputs:
    """Return the inputs of the post-mortem stage, from what is recorded of a checkpoint whose next step was taken."""
    names = {"scores": "scores", "first_order_e": "first_order_e", "scores_u": "scores_u"}
    return (
        {name: entry["inputs"][of] for name, of in (names | {"attribution": "first_order_u"}).items()}
        | entry["post_mortem"]
        | {name: getattr(config.variance, name) for name in ("normalizations", "baseline")}
        | {"units": config.units_of_e}
    )


def compared_interventions(entry: Inputs, config: ProbeConfig) -> Inputs:
    """Return the inputs of the interventions stage, from what is recorded of a checkpoint that has any."""
    names = ("learning_rate", "scores", "first_order_e", "half_steps_u", "update")
    settings = config.variance
    return (
        {name: entry[name] for name in ("checkpoint", "step")}
        | {name: entry["inputs"][name] for name in names}
        | entry["interventions"]
        | {"rewards": entry["price"].get("rewards", [])}
        | {name: getattr(settings, name) for name in ("normalizations", "baseline", "confidence_level")}
        | {"units": config.units_of_e, "margin": config.lab.margin}
    )


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
