"""Move the policy from θ to θ + ηv, where v is the step of an update per unit of learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from entropy_core.errors import NonFiniteError
from entropy_core.policy import moves
from entropy_core.sequences.processor import SequenceProcessor

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact


@contextmanager
def moved_by(processor: SequenceProcessor, update: "Artifact", eta: float) -> Iterator[None]:
    """Context in which the policy's parameters are θ + ηv; a NonFiniteError raised in it names η."""
    try:
        with moves.moved(processor.policy, update.vector("direction"), eta):
            yield
    except NonFiniteError as error:
        fact = f"at the step size η = {eta:g}: {error.fact}"
        raise NonFiniteError(fact, cause=error.cause, fix=error.fix) from None
