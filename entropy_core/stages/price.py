"""price: what the step does to the expected reward beside the entropy, from cached per-token columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from entropy_core.estimates import measurement
from entropy_core.estimates.batches import evaluation_batch, moved_batch, rescored_batch
from entropy_core.estimates.bought import Bought, bought, require_same_tokens
from entropy_core.estimates.diagnostics import numerical_noise
from entropy_core.estimates.price import Changes, OnE, price_row, reward_change, reward_derivative, reward_noise
from entropy_core.estimates.price_table import PRICE
from entropy_core.estimates.rows import Row, change_of, reliability
from entropy_core.estimates.tables import to_table
from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Baseline, Estimator, Normalization
from entropy_core.numerics.halves import HALVES
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        AlongV,
        AtStepSize,
        Attribution,
        Rescores,
        RewardShares,
        RewardsOfE,
        ScoresOfE,
    )


def price(
    out: "Writer",
    execution: "Execution",
    *,
    scores: "Sequence[ScoresOfE]",
    rescores: "Sequence[Rescores]",
    first_order_e: "Sequence[AlongV]",
    rewards: "Sequence[RewardsOfE]",
    shares: "RewardShares | None",
    attribution: "Attribution",
    learning_rate: float,
    moved: "Sequence[AtStepSize]",
    estimators: Sequence[Estimator],
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> dict[str, Any]:
    """Estimate the change of the expected reward at every step size, and its price in entropy.

    Args:
        out: writer of `price.parquet` (schema `price_table.PRICE`), one row per normalisation and step size but 0.
        execution: unused.
        scores: shards of score-e-batch.
        rescores: draws of rescore-e-batch on the first sequences, for the numerical noise.
        first_order_e: shards of first-order-e.
        rewards: shards of reward-e-batch.
        shares: artifact of reward-shares-u; None where a response of E has no reward.
        attribution: artifact of first-order-u.
        learning_rate: nominal learning rate, at which `bought` is.
        moved: one mapping per step size: `eta`, the `shards` of importance, and the shards of path-integral in `path`.
        estimators: of ΔH; the first is taken.
        normalizations: normalisations of the entropy.
        baseline: baseline of the return-to-go.
        units: independent units of E.
        confidence_level: confidence level of the intervals.

    Returns:
        Summary: number of rows; how many responses have no reward, then there are no rows; and `bought`, by
        normalisation, what the tokens of U do that cost entropy and buy no reward, see `estimates.bought`.
    """
    without = sum(shard.summary["open"] for shard in rewards)
    rows: list[Row] = []
    if not without:
        batch, _ = evaluation_batch(scores, first_order_e, baseline, units, rewards)
        sequences = [read_tokens([shard]) for shard in scores]
        again, rescored = rescored_batch(batch, sequences, rescores)
        of_rounding = reward_noise(again, rescored)
        floors = {of: (numerical_noise(again, rescored, of), of_rounding) for of in normalizations}
        on_e, estimator = OnE(batch, confidence_level), estimators[0]
        of_reward = reward_derivative(batch)
        for entry in moved:
            if not (eta := entry["eta"]):
                continue
            terms = measurement.measured(batch, moved_batch(entry, sequences), estimator)
            reliable = reliability(terms, len(batch), eta).reliable
            for of in normalizations:
                slopes = uncertainty.entropy_derivative(batch.columns, of), of_reward
                changes = Changes(
                    change_of(batch, terms, eta, estimator, of),
                    reward_change(batch, terms, eta, estimator),
                    (0.0, 0.0) if estimator == "path_integral" else floors[of],
                    terms.usable,
                    reliable,
                )
                where = {"normalization": of, "eta": eta, "eta_over_lr": entry["eta_over_lr"], "estimator": estimator}
                rows.append(where | price_row(on_e, slopes, changes, eta))
    out.table(to_table(rows, PRICE), "price.parquet")
    of_tokens: dict[str, Bought] = {}
    if shares is not None:
        table, of_u = shares.table("tokens.parquet"), attribution.table("tokens.parquet")
        require_same_tokens(table, of_u)
        reward_HK = learning_rate * torch.tensor(
            [table[f"share_{half}"].to_pylist() for half in HALVES], dtype=torch.float64
        )
        for of in normalizations:
            entropy_K = learning_rate * torch.tensor(of_u[f"share_{of}"].to_pylist(), dtype=torch.float64)
            of_tokens[of] = bought(entropy_K, reward_HK)
    return {"rows": len(rows), "without_reward": without, "bought": of_tokens}
