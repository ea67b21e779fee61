"""What a user can choose between, by name. The module of each formula says what a name means."""

from typing import Literal

Estimator = Literal["per_decision", "weighted_per_decision", "snis", "path_integral"]

Baseline = Literal["none", "time_loo", "time_loo_weighted", "ridge"]

Normalization = Literal["per_token", "per_sequence"]
