"""Compare predicted (δH₁) and measured (ΔH) entropy changes that share no sequence, from different E batches.

On one E batch the two share most of their sampling noise. With `E_replicates` ≥ 2 they can be independent: ΔH is
measured on the first batch and δH₁ is predicted on each further batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from entropy_core.estimates.selection import Row
from entropy_core.numerics.choices import Estimator

LARGEST_Z = 3.0


def independent(
    rows: Sequence[Row], replicates: Sequence[Row], estimator: Estimator = "snis"
) -> Iterator[dict[str, Any]]:
    """Compare ΔH on the first E batch with δH₁ on each further batch, for the same update.

    z = (ΔH − δH₁)/√(SE(ΔH)² + SE(δH₁)²). Its expectation is the curvature divided by the combined standard error.

    Args:
        rows: rows of `results.parquet`.
        replicates: rows of `replicates.parquet`.
        estimator: estimator of ΔH.

    Yields:
        A row per checkpoint, normalisation, further batch and non-zero step size, with the columns `checkpoint`,
        `normalization`, `eta_over_lr`, `seed` (of the further batch), `predicted`, `predicted_se`, `delta_h`,
        `delta_h_se` (nats, per token or per sequence), `z`, `agrees` (|z| < 3, or the verdict is nonlinear),
        `curvature`, `curvature_se`, `ess_fraction` and `verdict`.
    """
    for name, normalization in dict.fromkeys((row["checkpoint"], row["normalization"]) for row in rows):
        of_pair = [
            [row for row in table if (row["checkpoint"], row["normalization"]) == (name, normalization)]
            for table in (rows, replicates)
        ]
        measured = [row for row in of_pair[0] if row["estimator"] == estimator and row["eta"] != 0]
        for further in of_pair[1][1:]:
            for row in measured:
                scale = row["eta_over_lr"]  # the replicates predict the change at the learning rate
                predicted, predicted_se = scale * further["delta_h1"], abs(scale) * further["se_given_u"]
                difference = row["delta_h"] - predicted
                combined = math.hypot(row["delta_h_se"], predicted_se)
                z = difference / combined if combined else math.copysign(math.inf, difference) if difference else 0.0
                yield {
                    "checkpoint": name,
                    "normalization": normalization,
                    "eta_over_lr": scale,
                    "seed": further["seed"],
                    "predicted": predicted,
                    "predicted_se": predicted_se,
                    "z": z,
                    "agrees": abs(z) < LARGEST_Z or row["verdict"] == "nonlinear",
                } | {
                    column: row[column]
                    for column in ("delta_h", "delta_h_se", "curvature", "curvature_se", "ess_fraction", "verdict")
                }
