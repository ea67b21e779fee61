"""Interventions by name: what a user may write under `interventions`, and what each makes of loss and optimizer.

SETTINGS     a setting of the loss, as a trainer has it: `losses.spec.LossSpec` with another value
WEIGHTS      other weights of the tokens of U, or other advantages: `numerics.interventions`
OPTIMIZER    other hyperparameters: `numerics.altered_optimizer`
user's own   `file.py:function`, from a `LossBatch` to a factor for every token; see `weights_apart`
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from entropy_core.losses.spec import LossSpec
from entropy_core.numerics import interventions
from entropy_core.numerics.advantages import divided_by
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.interventions import Intervention, Known, Term, Terms
from entropy_core.numerics.losses import LOSSES

Value = float | str | bool | list[float] | None


class InterventionSpec(BaseModel):
    """One intervention with its value: all of it is part of the key of what is computed for it.

    Attributes:
        name: key of `SETTINGS`, `WEIGHTS` or `OPTIMIZER`, or the function of the user.
        value: what it is set to; None where there is nothing to set.
        source: digest of the user's file; empty otherwise.
        imports: digests of the modules beside that file that it imports.
        seed: of random choices.
        micro_batch: of the trainer, for a setting by which it averages over each where the run does not; 0: as the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    value: Value = None
    source: str = ""
    imports: dict[str, str] = Field({})
    seed: int = 0
    micro_batch: int = 0

    @property
    def label(self) -> str:
        """What the tables call it; the null begins with `random`."""
        if self.name == "random" and isinstance(self.value, float):
            return f"random {100 * self.value:g} %"
        return self.name if self.value is None else f"{self.name}: {_text(self.value)}"


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Kind(NamedTuple):
    """What values an intervention may have: bounds of a number or of each in a list of `numbers`, or some names."""

    numbers: int = 0
    low: float = 0.0
    high: float = 1.0
    names: tuple[Any, ...] = ()


_ON_POLICY = {
    "gspo": {"name": "grpo", "importance_sampling_level": "sequence"},
    "sapo": {"name": "grpo"},
    "vespo": {"name": "dapo"},
}
"""Losses that on-policy are another one: sequence-level ratios (arXiv:2507.18071), and weights of the ratio that have
the value 1 and, where they are differentiated, the slope 1 at a ratio of 1 (arXiv:2511.20347, arXiv:2602.10693)."""

SETTINGS: dict[str, _Kind] = {
    "loss": _Kind(names=(*LOSSES, *_ON_POLICY)),
    "scale_rewards": _Kind(names=("group", "batch", "none")),
    "kl_beta": _Kind(1, 0.0, 1000.0),
    "entropy_coef": _Kind(1, -100.0, 100.0),
    "top_entropy_quantile": _Kind(1, 1e-6, 1.0),
    "mask_truncated_completions": _Kind(names=(True, False)),
    "normalize_advantages": _Kind(names=(True, False)),
}
WEIGHTS: dict[str, tuple[Intervention, _Kind]] = {
    "random": (interventions.random, _Kind(1, 0.0, 0.99)),
    "clip_cov": (interventions.clip_cov, _Kind(1)),
    "drop_top_covariance": (interventions.drop_top_covariance, _Kind(1)),
    "clip_discriminator": (interventions.clip_discriminator, _Kind(1, 0.0, 1e6)),
    "drop_costliest": (interventions.drop_costliest, _Kind(1)),
    "drop_likely_positives": (interventions.drop_likely_positives, _Kind(1)),
    "positives_only": (interventions.positives_only, _Kind()),
    "negatives_only": (interventions.negatives_only, _Kind()),
    "weighted_positives": (interventions.weighted_positives, _Kind(1, 0.0, 1e6)),
    "quantile_baseline": (interventions.quantile_baseline, _Kind(1)),
    "log_prob_advantage": (interventions.log_prob_advantage, _Kind(1, -1e6, 1e6)),
    "entropy_advantage": (interventions.entropy_advantage, _Kind(1, 0.0, 1e6)),
    "dynamic_sampling": (interventions.dynamic_sampling, _Kind()),
    "pass_rate": (interventions.pass_rate, _Kind(2, -1e9, 1e9)),
}
OPTIMIZER: dict[str, _Kind] = {
    "lr": _Kind(1, 0.0, 1000.0),
    "max_grad_norm": _Kind(1, 0.0, 1e6),
    "weight_decay": _Kind(1, 0.0, 1000.0),
    "beta1": _Kind(1, 0.0, 0.999999),
    "beta2": _Kind(1, 0.0, 0.9999999),
}
ON_HALF_OF_E = {"drop_costliest"}
"""Those that select tokens by what one half of E says, and are judged on the other."""

PUBLISHED: tuple[tuple[str, Value], ...] = (
    *(("loss", name) for name in (*LOSSES, "gspo")),
    *(("scale_rewards", name) for name in ("group", "batch", "none")),
    *(("entropy_coef", value) for value in (0.001, 0.01, 0.1)),
    ("kl_beta", 0.0),
    ("kl_beta", 0.04),
    ("top_entropy_quantile", 0.2),
    ("mask_truncated_completions", True),
    ("clip_cov", 2e-4),
    ("drop_top_covariance", 2e-3),
    ("clip_discriminator", 2.0),
    ("drop_costliest", 0.02),
    ("drop_likely_positives", 0.9),
    ("positives_only", None),
    ("negatives_only", None),
    ("weighted_positives", 0.1),
    ("quantile_baseline", 0.4),
    ("log_prob_advantage", 0.01),
    ("entropy_advantage", 0.4),
    ("dynamic_sampling", None),
    ("pass_rate", [0.2, 0.8]),
    ("lr", 0.5),
    ("max_grad_norm", 0.1),
    ("weight_decay", 0.0),
    ("beta1", 0.0),
    ("beta2", 0.9),
    ("random", 0.02),
)
"""What `published` stands for. Those that are what the run does already are left out of a table."""


def asked_for(item: str | Mapping[str, JsonValue]) -> tuple[tuple[str, Value], ...]:
    """Return names and values of an entry of the configuration.

    Args:
        item: `published`, a name, `name=value`, `file.py:function`, or a mapping of one name to its value.

    Returns:
        Pairs of a name and its value.

    Raises:
        ValueError: there is no such intervention, or it cannot have this value.
    """
    if item == "published":
        return PUBLISHED
    if isinstance(item, str):
        if is_own(item):
            return ((item, None),)
        name, _, text = item.partition("=")
        return ((name, _checked(name, _parsed(text) if text else None)),)
    if len(item) != 1:
        raise ValueError(f"{dict(item)!r} is not one name and its value")
    ((name, value),) = item.items()
    return ((name, _checked(name, value)),)


def own_interventions(items: Sequence[str | Mapping[str, JsonValue]]) -> list[str]:
    """Return those of the user's own among the entries of a configuration."""
    return [item for item in items if isinstance(item, str) and is_own(item)]


def is_own(name: str) -> bool:
    """Tell a user's `file.py:function` or `package.module:function` from the name of an intervention."""
    return ":" in name


def _parsed(text: str) -> Any:
    """A number, true, false or a list as JSON has them, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(name: str, value: Any) -> Value:
    kinds = SETTINGS | {of: kind for of, (_, kind) in WEIGHTS.items()} | OPTIMIZER
    if name not in kinds:
        raise ValueError(f"there is no intervention {name!r}. Use published, {', '.join(kinds)}, or file.py:function")
    kind = kinds[name]
    if kind.names:
        if value in kind.names:
            return value
        raise ValueError(f"{name} is one of {', '.join(str(one).lower() for one in kind.names)}, and not {value!r}")
    if not kind.numbers:
        if value is None:
            return None
        raise ValueError(f"{name} has no value: write `- {name}`")
    numbers = value if isinstance(value, list) else [value]
    bad = [x for x in numbers if isinstance(x, bool) or not isinstance(x, int | float)]
    if bad or len(numbers) != kind.numbers or isinstance(value, list) is (kind.numbers == 1):
        wanted = "a number" if kind.numbers == 1 else f"a list of {kind.numbers} numbers"
        raise ValueError(f"{name} takes {wanted}, and not {value!r}")
    if not all(kind.low <= x <= kind.high for x in numbers):
        raise ValueError(f"{name} is between {kind.low:g} and {kind.high:g}, and not {value!r}")
    return [float(x) for x in numbers] if kind.numbers > 1 else float(numbers[0])


def changed_spec(spec: LossSpec, intervention: InterventionSpec) -> LossSpec:
    """Return the loss of the run with the setting that an intervention changes; the same for any other intervention."""
    name, value = intervention.name, intervention.value
    if intervention.source or name not in SETTINGS:
        return spec
    if intervention.micro_batch:
        spec = spec.model_copy(update={"micro_batch": intervention.micro_batch, "seed": intervention.seed})
    if name != "loss":
        return spec.model_copy(update={name: value})
    settings = _ON_POLICY.get(str(value), {"name": value})
    scaling = divided_by(str(settings["name"]), "auto")
    own = {"source": "", "imports": {}, "scale_rewards": scaling, "importance_sampling_level": "token"}
    return spec.model_copy(update=own | settings)


def not_applicable(spec: LossSpec, intervention: InterventionSpec) -> str:
    """Say why an intervention cannot be tried on this run; empty if it can."""
    changed = changed_spec(spec, intervention)
    if intervention.name in SETTINGS and not intervention.source and changed == spec:
        return "it is what the run does"
    if changed.kl_beta and not spec.kl_beta:
        return "the run has no reference policy: set update.kl_beta and update.reference"
    if changed.name == "reinforce" and changed.scale_rewards == "group":
        return "reinforce compares no responses within a group"
    return ""


def terms_of(intervention: InterventionSpec, known: Known) -> Terms:
    """Return the terms of the changed loss.

    Args:
        intervention: any but a user's own.
        known: U, with the batch of `changed_spec`.

    Returns:
        The terms; those of the batch as it is for a setting or a hyperparameter.
    """
    if intervention.name not in WEIGHTS:
        return (Term(known.batch),)
    function, _ = WEIGHTS[intervention.name]
    value = intervention.value
    values = value if isinstance(value, list) else [] if value is None else [value]
    return function(known, *values)


def altered(intervention: InterventionSpec) -> Altered:
    """Return the hyperparameters that an intervention changes."""
    if intervention.source or intervention.name not in OPTIMIZER:
        return Altered()
    assert isinstance(intervention.value, float)
    name = "learning_rate" if intervention.name == "lr" else intervention.name
    return Altered()._replace(**{name: intervention.value})
