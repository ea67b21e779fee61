"""Names of estimators, baselines and so on to choose from; the modules with the formulas explain them."""

from typing import Literal

Estimator = Literal["per_decision", "weighted_per_decision", "snis", "path_integral"]

Baseline = Literal["none", "time_loo", "time_loo_weighted", "ridge"]

Normalization = Literal["per_token", "per_sequence"]

Arithmetic = Literal["full", "tf32", "bf16"]
