"""What every optimizer's next step can be asked: its parts, and what it does to a covector.

    v = momentum + gradient + decay         per unit of the nominal learning rate
    P    v as a function of g with all denominators held fixed: linear, and gradient = P·g
    J    ∂v/∂g, the derivative of the whole step, denominators included

A rule is elementwise if each number of v depends only on the same number of θ, g and the state. A step by such a rule
can be computed for any block of a parameter; any other needs the whole parameter.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class NextStep(Protocol):
    """The next step of one parameter; everything is float64 and has the shape of the parameter."""

    @property
    def momentum(self) -> Tensor:
        """Part of v from the saved first moment."""

    @property
    def gradient(self) -> Tensor:
        """Part of v from the gradient g."""

    @property
    def decay(self) -> Tensor:
        """Part of v from weight decay."""

    @property
    def direction(self) -> Tensor:
        """The step v as exact arithmetic has it."""

    @property
    def taken(self) -> Tensor:
        """The step v as the optimizer computes it: the same, except where it works in a narrow dtype."""

    def preconditioned(self, covector: Tensor) -> Tensor:
        """Return Pᵀ·a of a covector a."""

    def pulled_back(self, covector: Tensor) -> Tensor:
        """Return Jᵀ·a of a covector a."""


class Diagonal:
    """The covectors of a rule whose P and J are diagonal, and that computes its step as it is."""

    @property
    def direction(self) -> Tensor:
        """The step v per unit of learning rate."""
        raise NotImplementedError

    @property
    def preconditioner(self) -> Tensor:
        """Diagonal of P."""
        raise NotImplementedError

    @property
    def jacobian(self) -> Tensor:
        """Diagonal of J."""
        raise NotImplementedError

    @property
    def taken(self) -> Tensor:
        """The step v as the optimizer computes it."""
        return self.direction

    def preconditioned(self, covector: Tensor) -> Tensor:
        """Return P·a of a covector a."""
        return self.preconditioner * covector

    def pulled_back(self, covector: Tensor) -> Tensor:
        """Return J·a of a covector a."""
        return self.jacobian * covector


class Rule(NamedTuple):
    """How an optimizer makes a step.

    Attributes:
        name: of the optimizer.
        hyperparameters: a NamedTuple class; `relative_lr` is the group's learning rate over the nominal one.
        state: a NamedTuple class of `step`, the number of steps taken, and moments under the optimizer's names.
        next_step: `NextStep` of (gradient, parameter, state, hyperparameters).
        elementwise: whether blocks of a parameter can be computed one by one.
        counts: whether the state says how many steps were taken.
        no_interval: why there is no valid interval over U; empty if there may be one.
        has_after: whether its step knows the state after it, `after`, from which another step can start.
    """

    name: str
    hyperparameters: type
    state: type
    next_step: type
    elementwise: bool = True
    counts: bool = True
    no_interval: str = ""
    has_after: bool = True
