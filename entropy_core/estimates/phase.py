"""What the steps on one rollout do to the entropy and to the expected reward, step by step, on the same E."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from entropy_core.estimates.phase_table import Word
from entropy_core.estimates.price import OnE
from entropy_core.estimates.rows import Reliability, Row
from entropy_core.numerics.uncertainty import Estimate

OF_STEP = (
    *("clip_low", "clip_high", "clip_dual", "left_out", "largest_ratio", "approx_kl", "reference_kl"),
    *("entropy_of_minibatch", "gradient_norm", "clip_factor", "step_norm", "update_norm"),
)
"""What phase-step says of itself and the table repeats."""


class AfterStep(NamedTuple):
    """What is measured after one step.

    Args:
        change: ΔH since the rollout.
        before: the same after the step before; 0 after none.
        of_run: ΔH of the run as it is after as many steps; None for the run itself.
        reward: ΔJ since the rollout; None without rewards.
        reliability: of the weights from the policy of the rollout.
        usable: False if a weight over- or underflowed.
    """

    change: Estimate
    before: Estimate
    of_run: Estimate | None
    reward: Estimate | None
    reliability: Reliability
    usable: bool


def phase_row(on_e: OnE, H: float, after: AfterStep, noise_floor: float, first: bool) -> Row:
    """Compute the measured columns of one step.

    Rounding errors are those of one draw for each pass over E, so their variance, (noise floor/2)², is added to that of
    a change since the rollout, and twice to that of a change from step to step, but for the first, and of a difference.

    Args:
        on_e: E, and the confidence level.
        H: entropy of the policy that drew the rollout.
        after: what is measured.
        noise_floor: twice the rms of the numerical noise of ΔH, nats.
        first: whether this is the first step.

    Returns:
        Columns of `phase_table.PHASE` from `H` on; the measured ones are None if weights overflowed.
    """
    of_step = after.change.minus(after.before)
    columns: Row = {"H": H + after.change.value}
    rounding, twice = noise_floor / 2, noise_floor / math.sqrt(2)
    for name, estimate, error in (
        ("delta_h", after.change, rounding),
        ("of_step", of_step, rounding if first else twice),
        ("difference", None if after.of_run is None else after.change.minus(after.of_run), twice),
        ("delta_j", after.reward, 0.0),
    ):
        columns |= _with_interval(on_e, name, estimate, error)
    low, high = columns["delta_h_low"], columns["delta_h_high"]
    word: Word = "entropy rises" if low > 0 else "entropy falls" if high < 0 else "cannot tell"
    if not after.usable:
        columns = dict.fromkeys(columns)
    ess, k, _, reliable = after.reliability
    return {
        **columns,
        "ess": ess,
        "ess_fraction": ess / len(on_e.batch),
        "pareto_k": k,
        "verdict": word if reliable else "weights-unreliable",
        "confidence_level": on_e.confidence_level,
    }


def _with_interval(on_e: OnE, name: str, estimate: Estimate | None, rounding: float) -> Row:
    names = (name, f"{name}_se", f"{name}_low", f"{name}_high")
    if estimate is None:
        return dict.fromkeys(names)
    error = math.hypot(on_e.batch.standard_error(estimate), rounding)
    return dict(zip(names, (estimate.value, error, *on_e.ends(estimate.value, error)), strict=True))


def place_of(number: int, minibatches: int) -> Row:
    """Say which step this is, from its number, from 0."""
    return {"phase_step": number + 1, "epoch": number // minibatches + 1, "minibatch": number % minibatches + 1}


def of_the_step(summary: Mapping[str, Any], learning_rate: float) -> Row:
    """Return the columns that the step itself has, from its summary and the nominal learning rate."""
    return {"learning_rate": learning_rate * summary["rate"]} | {name: summary[name] for name in OF_STEP}
