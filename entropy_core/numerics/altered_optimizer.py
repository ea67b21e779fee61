"""Other hyperparameters of the optimizer: what becomes of the parts of a step whose denominators stay as they are.

    v = momentum + gradient + decay,    v' = μ·momentum + γ·gradient + δ·decay

The parts are those of `adamw.NextStep`. With frozen denominators the factors are exact; β₂ acts through the
denominators alone and has none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from entropy_core.numerics.adamw import AdamHyperparameters

Group = TypeVar("Group", bound=Any)
"""Hyperparameters of a parameter group, by any rule."""


class Altered(NamedTuple):
    """Hyperparameters in place of the run's; None: as they are.

    Args:
        learning_rate: factor of the learning rate.
        max_grad_norm: global norm at which the gradient is clipped; 0 for no clipping.
        weight_decay: of the parameter groups that have any.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """

    learning_rate: float = 1.0
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None

    def of(self, group: Group) -> Group:
        """Return the hyperparameters of a group with these in their place, the factor of the learning rate included."""
        changed: dict[str, float] = {"relative_lr": group.relative_lr * self.learning_rate}
        if self.weight_decay is not None and group.weight_decay:
            changed["weight_decay"] = self.weight_decay
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        return group._replace(**changed, **{name: beta for name, beta in betas.items() if beta is not None})

    @property
    def of_adamw(self) -> bool:
        """Whether it changes a hyperparameter that other optimizers have otherwise or not at all."""
        return (self.weight_decay, self.beta1, self.beta2) != (None, None, None)


class Factors(NamedTuple):
    """Factors γ, μ and δ of the parts of the step, and that of its rounding."""

    gradient: float = 1.0
    momentum: float = 1.0
    decay: float = 1.0
    rounding: float = 1.0

    def times(self, factor: float) -> "Factors":
        """Multiply all of them."""
        return Factors(*(factor * one for one in self))


def step_factors(altered: Altered, groups: Sequence[tuple[AdamHyperparameters, int]]) -> Factors | None:
    """Return the factors of the parts of a step under other hyperparameters, without that of clipping.

    Args:
        altered: the hyperparameters.
        groups: hyperparameters of each parameter group, and the number t of the step, from 1.

    Returns:
        The factors; None if the groups have different ones, or if they act through the denominators.
    """
    if altered.beta2 is not None:
        return None
    of_groups = [(_of_group(altered, *group), group[0].weight_decay > 0) for group in groups]
    gradients, momenta = ({getattr(factors, name) for factors, _ in of_groups} for name in ("gradient", "momentum"))
    decays = {factors.decay for factors, has_decay in of_groups if has_decay} or {altered.learning_rate}
    if max(map(len, (gradients, momenta, decays))) > 1:
        return None
    return Factors(gradients.pop(), momenta.pop(), decays.pop(), altered.learning_rate)


def _of_group(altered: Altered, before: AdamHyperparameters, t: int) -> Factors:
    after = altered.of(before)
    correction = (1.0 - before.beta1**t) / (1.0 - after.beta1**t)
    gradient = altered.learning_rate * correction * (1.0 - after.beta1) / (1.0 - before.beta1)
    momentum = altered.learning_rate * (correction * after.beta1 / before.beta1 if before.beta1 else 1.0)
    decay = after.weight_decay / before.weight_decay if before.weight_decay else 1.0
    return Factors(gradient, momentum, decay * (altered.learning_rate if before.decoupled else gradient))


def kept_on(groups: Sequence[tuple[AdamHyperparameters, int]]) -> float | None:
    """Return the factor of the gradient's part once the first moment has become this gradient: (1 − β₁ᵗ)/(1 − β₁).

    The momentum of the past is then gone. None if the parameter groups have different factors.
    """
    found = {(1.0 - group.beta1**t) / (1.0 - group.beta1) for group, t in groups}
    return found.pop() if len(found) == 1 else None
