"""The columns of price.parquet: what a step does to the expected reward, and the price of it in entropy."""

import pyarrow as pa

from entropy_core.estimates.fields import NATS, REAL, TEXT, field

_UNIT = "reward"
_PRICE = "nats per unit of reward"
_PRICED = "Fieller's interval of it for this update; null if the change of the reward is not told from 0"

PRICE = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence: of the entropy"),
        field("eta", REAL, "learning-rate unit", "absolute step size: the policy moves to theta + eta * v"),
        field("eta_over_lr", REAL, "1", "eta divided by the checkpoint's learning rate"),
        field("estimator", TEXT, "", "estimator of delta_h and delta_j"),
        field("J", REAL, _UNIT, "expected reward of the policy, responses cut at max_new_tokens; on E"),
        field("J_se", REAL, _UNIT, "standard error of J for this policy: over E"),
        field("delta_j1", REAL, _UNIT, "predicted change of J, first order: eta times the derivative along v"),
        field("delta_j1_se", REAL, _UNIT, "standard error of delta_j1 for this update: over E"),
        field("delta_j1_low", REAL, _UNIT, "lower end of the interval of delta_j1 for this update"),
        field("delta_j1_high", REAL, _UNIT, "upper end of the interval of delta_j1 for this update"),
        field("delta_j", REAL, _UNIT, "measured change of J, by importance sampling on the same E"),
        field("delta_j_se", REAL, _UNIT, "standard error of delta_j for this update: over E, and of rounding"),
        field("delta_j_low", REAL, _UNIT, "lower end of the interval of delta_j for this update"),
        field("delta_j_high", REAL, _UNIT, "upper end of the interval of delta_j for this update"),
        field("minimum_detectable", REAL, _UNIT, "smallest |delta_j| of this update detected with probability 80 %"),
        field("delta_h1", REAL, NATS, "predicted change of H, first order"),
        field("delta_h", REAL, NATS, "measured change of H"),
        field("price_first_order", REAL, _PRICE, "delta_h1 / delta_j1"),
        field("price_first_order_low", REAL, _PRICE, f"lower end: {_PRICED}"),
        field("price_first_order_high", REAL, _PRICE, f"upper end: {_PRICED}"),
        field("price", REAL, _PRICE, "delta_h / delta_j: the entropy that goes with each unit of reward"),
        field("price_low", REAL, _PRICE, f"lower end: {_PRICED}"),
        field("price_high", REAL, _PRICE, f"upper end: {_PRICED}"),
        field("confidence_level", REAL, "1", "confidence level of every interval in this row"),
        field("verdict", TEXT, "", "reward rises, reward falls, cannot tell, or weights-unreliable; by delta_j"),
    ]
)
"""One row per normalisation and step size but 0."""
