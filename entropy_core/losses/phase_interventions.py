"""Interventions along a phase: what a user may write under `update.phase.interventions`.

Settings of the loss and hyperparameters of the optimizer are those of every step. Tokens and responses are selected at
the rollout, from all of it, and are then the same in every epoch. The bounds of clipping are interventions here alone:
on the first step they do nothing.
"""

from collections.abc import Mapping

from pydantic import JsonValue

from entropy_core.losses.interventions import OPTIMIZER, SETTINGS, WEIGHTS, InterventionSpec, Value, asked_for, is_own
from entropy_core.losses.phase import PhaseSpec

CLIPPING = {"epsilon": (0.0, 1.0), "epsilon_high": (0.0, 1e6), "delta": (1.0, 1e6)} | {
    "off_policy_mask_threshold": (0.0, 1e6)
}
"""Name → lowest and highest value."""

NOT_FOLLOWED = {
    "clip_discriminator": "it selects by the discriminator, which is computed for the first step alone",
    "drop_costliest": "it selects by sensitivities, which are computed for the first step alone",
    "log_prob_advantage": "it gives tokens advantages of their own, whose signs clipping would go by",
    "entropy_advantage": "it gives tokens advantages of their own, whose signs clipping would go by",
    "dynamic_sampling": "it leaves prompts out, and minibatches would be of another size",
    "pass_rate": "it leaves prompts out, and minibatches would be of another size",
}
"""Name → why."""


def asked_in_phase(item: str | Mapping[str, JsonValue]) -> tuple[str, Value]:
    """Return name and value of an entry of the configuration.

    Args:
        item: a name, `name=value`, or a mapping of one name to its value.

    Returns:
        The pair.

    Raises:
        ValueError: there is no such intervention, it cannot have this value, or it cannot be followed.
    """
    text = item if isinstance(item, str) else next(iter(item), "")
    name = text.partition("=")[0]
    if name in CLIPPING:
        return name, _bound(name, item)
    if is_own(name) or name == "published":
        raise ValueError(f"{name} is not followed along the phase. Name one of {', '.join(followed_names())}")
    ((name, value),) = asked_for(item)
    why = NOT_FOLLOWED.get(name, "")
    if name == "loss" and value in ("sapo", "vespo"):
        why = "its later steps on a rollout have another gradient than the losses here"
    if why:
        raise ValueError(f"{name} is not followed along the phase: {why}")
    return name, value


def followed_names() -> list[str]:
    """Names that `asked_in_phase` accepts."""
    return [name for name in (*CLIPPING, *SETTINGS, *WEIGHTS, *OPTIMIZER) if name not in NOT_FOLLOWED]


def changed_phase(phase: PhaseSpec, intervention: InterventionSpec) -> PhaseSpec:
    """Return the phase with the bound that an intervention changes; the same for any other intervention."""
    if intervention.name not in CLIPPING:
        return phase
    return phase.model_copy(update={intervention.name: intervention.value})


def _bound(name: str, item: str | Mapping[str, JsonValue]) -> float:
    value: JsonValue = item.partition("=")[2] if isinstance(item, str) else item[name]
    low, high = CLIPPING[name]
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name} takes a number, and not {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} is between {low:g} and {high:g}, and not {value!r}")
    return number
