"""The prediction to second order, δH₁ + δH₂, from the step sizes at which the change was measured.

θ are the checkpoint's parameters, v is the step per unit of learning rate, η the step size, and U the update batch.
δH₂ = ½η²∂²_vH, and the three intervals of δH₁ + δH₂ are for the same questions as those of δH₁; see `rows`.
"""

import math

from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.intervals import intervals, widened
from entropy_core.estimates.measurement import Measured
from entropy_core.estimates.rows import Derivative, Row, reliability
from entropy_core.numerics import second_order, uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.quadrature import NODES
from entropy_core.numerics.second_order import Observation, SecondOrder
from entropy_core.numerics.uncertainty import Estimate

NONE = "none: at no step size but 0 are the weights reliable"


def observations(
    batch: EvaluationBatch,
    terms: Measured,
    change: Estimate,
    derivative: Estimate,
    eta: float,
    normalization: Normalization,
    rounding: float,
) -> list[Observation]:
    """Compute what one step size says about ½∂²_vH.

    Args:
        batch: E.
        terms: `measurement.measured` by `per_decision` or by `path_integral`.
        change: ΔH from `rows.change_of` on these terms.
        derivative: ∂_vH by `per_decision`.
        eta: absolute step size.
        normalization: per sequence or per token.
        rounding: standard deviation of the rounding error of ΔH, nats.

    Returns:
        One observation from ΔH, or one from each node of the path integral; none for η = 0 or unreliable weights.
    """
    weights = reliability(terms, len(batch), eta)
    if not weights.reliable or not _has_a_square(eta):
        return []
    x = second_order.spread(weights.ess / len(batch), eta)
    if not isinstance(terms.columns, tuple):
        return [second_order.of_change(change, derivative, eta, x, rounding)]
    shares = [node / NODES[-1] for node in NODES]  # the weights are those at the last node
    return [
        second_order.of_slope(
            uncertainty.entropy_derivative(columns, normalization), derivative, node * eta, share * x, rounding
        )
        for columns, node, share in zip(terms.columns, NODES, shares, strict=True)
    ]


def _has_a_square(eta: float) -> bool:
    """Tell if η² is neither 0 nor too large or too small for a float."""
    return 1e-100 < abs(eta) < 1e100


def predict(
    batch: EvaluationBatch, derivative: Derivative, second: SecondOrder | None, eta: float, confidence_level: float
) -> Row:
    """Compute δH₂ and δH₁ + δH₂ with their standard errors and intervals.

    Args:
        batch: E.
        derivative: ∂_vH from `rows.derivative_of`.
        second: ½∂²_vH; None if there is no step size to estimate it from.
        eta: absolute step size.
        confidence_level: confidence level of the intervals, which use t quantiles.

    Returns:
        Columns of `estimate_columns.ESTIMATES`, in nats.
    """
    over_u = derivative.over_u.invalid
    if second is None or not (eta == 0 or _has_a_square(eta)):
        ends, _ = intervals("delta_h12_", 0.0, 0.0, derivative.randomness, 0.0, confidence_level)  # for their names
        names = ("delta_h2", "delta_h2_se", "delta_h2_this_update_low", "delta_h2_this_update_high")
        missing = dict.fromkeys([*names, "delta_h12", "delta_h12_se", *ends])
        return {**missing, "delta_h2_points": 0, "second_order": NONE, "delta_h12_interval_over_u": NONE}
    first, curved = derivative.estimate.scaled(eta), second.coefficient.scaled(eta**2)
    fixed = second.fixed * eta**2
    error = math.hypot(batch.standard_error(curved), fixed)
    quantile = t_quantile(0.5 + confidence_level / 2, derivative.units_e - 1)
    both = first.plus(curved)
    both_error = math.hypot(batch.standard_error(both), fixed, derivative.numerical * eta)
    widen = widened(first.value, curved.value)
    ends, _ = intervals("delta_h12_", both.value, both_error, derivative.randomness, eta, confidence_level, widen)
    if not over_u and math.isinf(widen):
        over_u = "the second order is more than half of the first"
    error_per_step = math.hypot(batch.standard_error(second.coefficient), second.fixed)
    valid = not derivative.invalid_over_e
    resolved = valid and abs(second.coefficient.value) > quantile * error_per_step
    return {
        "delta_h2": curved.value,
        "delta_h2_se": error,
        "delta_h2_this_update_low": curved.value - quantile * error if valid else None,
        "delta_h2_this_update_high": curved.value + quantile * error if valid else None,
        "delta_h2_points": second.points,
        "second_order": "resolved" if resolved else "unresolved",
        "delta_h12": both.value,
        "delta_h12_se": both_error,
        **ends,
        "delta_h12_interval_over_u": f"no valid interval over U: {over_u}" if over_u else "valid",
    }


def remainder(
    batch: EvaluationBatch,
    change: Estimate | None,
    derivative: Derivative,
    second: SecondOrder | None,
    eta: float,
    noise_floor: float,
) -> Row:
    """Compute ΔH − δH₁ − δH₂, what the prediction to second order leaves out, paired on E.

    Args:
        batch: E.
        change: ΔH from `rows.change_of`; None if it was not measurable.
        derivative: ∂_vH from `rows.derivative_of`.
        second: ½∂²_vH, or None.
        eta: absolute step size.
        noise_floor: twice the rms of the numerical noise of ΔH, nats.

    Returns:
        Columns of `estimate_columns.ESTIMATES`, in nats.
    """
    if change is None or second is None or not (eta == 0 or _has_a_square(eta)):
        return {"remainder": None, "remainder_se": None}
    left = change.minus(derivative.estimate.scaled(eta)).minus(second.coefficient.scaled(eta**2))
    fixed = math.hypot(second.fixed * eta**2, noise_floor / 2, derivative.numerical * eta)
    return {"remainder": left.value, "remainder_se": math.hypot(batch.standard_error(left), fixed)}
