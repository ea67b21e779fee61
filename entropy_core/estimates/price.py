"""What a step does to the expected reward J beside the entropy H, and the price of one in the other.

    δJ₁ = η·∂_vJ,     ΔJ = J(θ + ηv) − J(θ),     price = ΔH/ΔJ,  the entropy that goes with each unit of reward

J is E[F] of the functional `REWARD`, estimated from the same sequences of E as the entropy, so that both changes share
their noise. Everything here is for this update: it has the error over E, and not that over U.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from entropy_core.estimates.diagnostics import twice_rms
from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured
from entropy_core.estimates.price_table import Word
from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Estimator
from entropy_core.numerics.fieller import Moments, ratio_interval
from entropy_core.numerics.functional import REWARD
from entropy_core.numerics.quadrature import WEIGHTS
from entropy_core.numerics.uncertainty import Estimate

Row = dict[str, Any]

_OF_DIFFERENCE = ("delta_j", "difference_j", "difference_j_se", "difference_j_low", "difference_j_high")
NO_REWARD: Row = dict.fromkeys((*_OF_DIFFERENCE, "price", "price_low", "price_high"))
"""The columns of `difference_columns` where nothing is known."""


class OnE(NamedTuple):
    """How errors over E become intervals.

    Args:
        batch: E, with rewards.
        confidence_level: of the intervals, which use t quantiles.
    """

    batch: EvaluationBatch
    confidence_level: float

    @property
    def quantile(self) -> float:
        """Two-sided t quantile."""
        return t_quantile(0.5 + self.confidence_level / 2, self.batch.units - 1)

    def ends(self, value: float, standard_error: float) -> tuple[float, float]:
        """Return the ends of the interval of a value."""
        half = self.quantile * standard_error
        return value - half, value + half

    def ratio(
        self, numerator: Estimate, denominator: Estimate, rounding: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[float, float] | None:
        """Return the ends of Fieller's interval of a ratio, whose estimates share E and may have errors of rounding."""
        aa, bb = (self.batch.standard_error(x) ** 2 for x in (numerator, denominator))
        ab = (self.batch.standard_error(numerator.plus(denominator)) ** 2 - aa - bb) / 2
        of_rounding = [error**2 for error in rounding]
        moments = Moments(numerator.value, denominator.value, aa + of_rounding[0], bb + of_rounding[1], ab)
        return ratio_interval(moments, self.quantile)


def reward_derivative(batch: EvaluationBatch) -> Estimate:
    """Estimate ∂_vJ, per unit step, on an E with rewards."""
    return uncertainty.mean(batch.columns[REWARD].derivative_N)


def reward_change(batch: EvaluationBatch, terms: Measured, eta: float, estimator: Estimator) -> Estimate:
    """Estimate ΔJ between θ and θ + ηv, paired on the sequences of E.

    Args:
        batch: E at θ, with rewards.
        terms: `measurement.measured` with the same estimator.
        eta: absolute step size, not 0.
        estimator: estimator of ΔJ.

    Returns:
        ΔJ in units of the reward.
    """
    if isinstance(terms.columns, tuple):
        parts = [
            uncertainty.mean(columns[REWARD].derivative_N).scaled(eta * weight)
            for weight, columns in zip(WEIGHTS, terms.columns, strict=True)
        ]
        return reduce(Estimate.plus, parts)
    assert terms.columns is not None
    before_N, after_N = batch.value_columns(estimator)[REWARD].total_N, terms.columns[REWARD]
    if estimator == "snis":  # per sequence it is the same ratio for every functional
        weights = terms.weights_N, batch.sampling.weights_N
        there, here = (
            uncertainty.snis_entropy(w_N, F_N, F_N, "per_sequence")
            for w_N, F_N in zip(weights, (after_N, before_N), strict=True)
        )
        return there.minus(here)
    return uncertainty.mean(after_N).minus(uncertainty.mean(before_N))


def reward_noise(batch: EvaluationBatch, rescored: Sequence[Measured]) -> float:
    """Compute twice the root mean square of the ΔJ that rounding alone produces; see `diagnostics.numerical_noise`."""
    return twice_rms([reward_change(batch, terms, 1.0, "per_decision").value for terms in rescored])


class Changes(NamedTuple):
    """Both measured changes, twice the rms of what rounding alone does to each, and whether they can be trusted."""

    entropy: Estimate
    reward: Estimate
    noise_floors: tuple[float, float]
    usable: bool
    reliable: bool


def price_row(on_e: OnE, slopes: tuple[Estimate, Estimate], changes: Changes, eta: float) -> Row:
    """Compute what a step size does to the expected reward, and the price in entropy.

    Args:
        on_e: E, with rewards.
        slopes: ∂_vH and ∂_vJ.
        changes: ΔH and ΔJ.
        eta: absolute step size, not 0.

    Returns:
        Columns of `price_table.PRICE` from `J` on; the measured ones are None if weights overflowed.
    """
    batch, J = on_e.batch, uncertainty.mean(on_e.batch.columns[REWARD].total_N)
    delta_h1, delta_j1 = (slope.scaled(eta) for slope in slopes)
    first_order_low, first_order_high = on_e.ends(delta_j1.value, batch.standard_error(delta_j1))
    rounding = changes.noise_floors[0] / 2, changes.noise_floors[1] / 2
    error = math.hypot(batch.standard_error(changes.reward), rounding[1])
    low, high = on_e.ends(changes.reward.value, error)
    of_measured: Row = {
        "delta_j": changes.reward.value,
        "delta_j_se": error,
        "delta_j_low": low,
        "delta_j_high": high,
        "minimum_detectable": (on_e.quantile + uncertainty.POWER_QUANTILE) * error,
        "delta_h": changes.entropy.value,
        **_priced("price", on_e, changes.entropy, changes.reward, rounding),
    }
    told: Word = "reward rises" if low > 0 else "reward falls" if high < 0 else "cannot tell"
    return {
        "J": J.value,
        "J_se": batch.standard_error(J),
        "delta_j1": delta_j1.value,
        "delta_j1_se": batch.standard_error(delta_j1),
        "delta_j1_low": first_order_low,
        "delta_j1_high": first_order_high,
        "delta_h1": delta_h1.value,
        **_priced("price_first_order", on_e, delta_h1, delta_j1),
        **(of_measured if changes.usable else dict.fromkeys(of_measured)),
        "confidence_level": on_e.confidence_level,
        "verdict": told if changes.reliable else "weights-unreliable",
    }


def difference_columns(on_e: OnE, entropy: Estimate, reward: Estimate, of_run: Estimate) -> Row:
    """Compute what an intervention does to the expected reward, and the entropy that goes with it.

    Args:
        on_e: E, with rewards.
        entropy: ΔH under the intervention minus that of the run as it is.
        reward: ΔJ under the intervention.
        of_run: ΔJ of the run as it is.

    Returns:
        The columns of `tables.INTERVENTIONS` on the reward.
    """
    difference = reward.minus(of_run)
    error = on_e.batch.standard_error(difference)
    low, high = on_e.ends(difference.value, error)
    return {
        "delta_j": reward.value,
        "difference_j": difference.value,
        "difference_j_se": error,
        "difference_j_low": low,
        "difference_j_high": high,
        **_priced("price", on_e, entropy, difference),
    }


def _priced(
    name: str, on_e: OnE, entropy: Estimate, reward: Estimate, rounding: tuple[float, float] = (0.0, 0.0)
) -> Row:
    low, high = on_e.ratio(entropy, reward, rounding) or (None, None)
    ratio = entropy.value / reward.value if reward.value else None
    return {name: ratio, f"{name}_low": low, f"{name}_high": high}
