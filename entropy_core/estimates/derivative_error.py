"""The error of δH₁ that comes from how the derivatives over E were computed: a less exact arithmetic, or differences.

δH₁ is linear in the derivatives of the tokens. On the first sequences of E they are known in full precision, too, and
the estimate of their error in the place of the derivatives is the error of δH₁, paired on these sequences.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from entropy_core.estimates.evaluation import Bases, EvaluationBatch
from entropy_core.estimates.selection import Row
from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.functional import TokenPair, Tokens
from entropy_core.store.columns import TokenTable, concatenate, read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact


class DerivativeError(NamedTuple):
    """Mean error of ∂_vH and its standard error over the sequences on which it was measured, nats per unit step."""

    value: float
    standard_error: float

    @property
    def size(self) -> float:
        """What is to be expected of it on all of E, as a standard deviation."""
        return math.hypot(self.value, self.standard_error)


def derivative_error(
    batch: EvaluationBatch,
    calibration: "Artifact | None",
    sequences: Sequence[TokenTable],
    normalization: Normalization,
) -> DerivativeError | None:
    """Estimate the error of ∂_vH.

    Rounding is not shared by the sequences of a prompt, so that each sequence counts as a unit.

    Args:
        batch: E.
        calibration: artifact of calibrate; None for forward mode in full precision.
        sequences: the sequences of each shard of E; an artifact of other sequences is refused.
        normalization: per sequence or per token.

    Returns:
        The error; None for forward mode in full precision, which has nothing to be compared with.
    """
    if calibration is None:
        return None
    first = batch.first(calibration.summary["sequences"])
    of_first = concatenate(sequences).first(calibration.summary["sequences"])
    errors = of_first.join(read_tokens([calibration], "dlogprobs", "dentropies"))

    def read() -> Iterator[tuple[Tokens, Bases]]:
        start = 0
        for tokens, bases in first.read():
            stop = start + len(tokens.entropies_K)
            along = TokenPair(errors["dlogprobs"][start:stop], errors["dentropies"][start:stop])
            yield tokens._replace(along=along), bases
            start = stop

    columns = EvaluationBatch(read, None, first.functionals).columns
    found = uncertainty.entropy_derivative(columns, normalization)
    return DerivativeError(found.value, uncertainty.standard_error(found.influence_N, None))


def describe(calibration: "Artifact | None") -> Row:
    """Say how the derivatives over E were computed.

    Args:
        calibration: artifact of calibrate; None for forward mode in full precision.

    Returns:
        Columns of `estimate_columns.ESTIMATES`.
    """
    if calibration is None:
        return {"arithmetic": "full", "derivative_check": None}
    return {"arithmetic": calibration.summary["arithmetic"], "derivative_check": calibration.summary["difference"]}


def of_step(error: DerivativeError | None, eta: float) -> Row:
    """Compute the error of δH₁ at a step size.

    Args:
        error: of ∂_vH; None where nothing was compared.
        eta: absolute step size.

    Returns:
        Columns of `estimate_columns.ESTIMATES`, nats.
    """
    if error is None:
        return {"derivative_error": None, "derivative_error_se": None}
    return {"derivative_error": error.value * eta, "derivative_error_se": error.standard_error * abs(eta)}
