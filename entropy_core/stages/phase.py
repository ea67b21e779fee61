"""phase: entropy and expected reward along the optimizer steps on one rollout, from cached per-token columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from entropy_core.estimates import measurement
from entropy_core.estimates.batches import evaluation_batch, moved_batch, rescored_batch
from entropy_core.estimates.diagnostics import describe_batch, numerical_noise
from entropy_core.estimates.phase import AfterStep, of_the_step, phase_row, place_of
from entropy_core.estimates.phase_table import CLIPPED, PHASE
from entropy_core.estimates.price import OnE, reward_change
from entropy_core.estimates.rows import Row, change_of, reliability
from entropy_core.estimates.tables import to_table
from entropy_core.numerics.choices import Baseline, Estimator, Normalization
from entropy_core.numerics.functional import REWARD
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import AlongV, MeasuredPhaseStep, Rescores, RewardsOfE, ScoresOfE


def phase(
    out: "Writer",
    execution: "Execution",
    *,
    scores: "Sequence[ScoresOfE]",
    rescores: "Sequence[Rescores]",
    first_order_e: "Sequence[AlongV]",
    rewards: "Sequence[RewardsOfE]",
    steps: "Sequence[MeasuredPhaseStep]",
    minibatches: int,
    learning_rate: float,
    estimators: Sequence[Estimator],
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
) -> dict[str, Any]:
    """Estimate ΔH and ΔJ since the rollout after every step.

    Args:
        out: writer of `phase.parquet` (schema `phase_table.PHASE`), one row per normalisation, intervention (`as it is`
            included) and step, and `clipped.parquet` (schema `phase_table.CLIPPED`), one per intervention, step, and
            token that the step clips.
        execution: unused.
        scores: shards of score-e-batch.
        rescores: draws of rescore-e-batch on the first sequences, for the numerical noise.
        first_order_e: shards of first-order-e.
        rewards: shards of reward-e-batch; none, or one response without a reward: nothing is said of the reward.
        steps: the steps in their order, each with E after it; first those of the run as it is, then those under each
            intervention.
        minibatches: M, into how many parts the rollout is cut.
        learning_rate: the nominal one.
        estimators: of ΔH; the first is taken.
        normalizations: normalisations of the entropy.
        baseline: baseline of the return-to-go.
        units: independent units of E.
        confidence_level: confidence level of the intervals.

    Returns:
        Summary: numbers of rows, of steps, and of tokens that are clipped.
    """
    known = [] if any(shard.summary["open"] for shard in rewards) else rewards
    batch, _ = evaluation_batch(scores, first_order_e, baseline, units, known)
    sequences, estimator = [read_tokens([shard]) for shard in scores], estimators[0]
    again, rescored = rescored_batch(batch, sequences, rescores)
    by_path = estimator == "path_integral"
    floors = {of: 0.0 if by_path else numerical_noise(again, rescored, of) for of in normalizations}
    on_e = OnE(batch, confidence_level)
    none = Estimate(0.0, torch.zeros(len(batch), dtype=torch.float64))
    changes: dict[tuple[str, int, Normalization], Estimate] = {}
    rows: list[Row] = []
    of_run = steps[0]["intervention"]
    for entry in steps:
        at, summary, number, what = entry["at"], entry["step"].summary, entry["number"], entry["intervention"]
        terms = measurement.measured(batch, moved_batch(at, sequences), estimator)
        rewarded = REWARD in batch.functionals
        reward = reward_change(batch, terms, at["eta"], estimator) if rewarded else None
        reliable = reliability(terms, len(batch), at["eta"])
        for of in normalizations:
            change = change_of(batch, terms, at["eta"], estimator, of)
            changes[what, number, of] = change
            before = changes.get((what, number - 1, of), none)
            other = None if what == of_run else changes[of_run, number, of]
            after = AfterStep(change, before, other, reward, reliable, terms.usable)
            rows.append(
                {"normalization": of, "estimator": estimator, "intervention": what}
                | place_of(number, minibatches)
                | of_the_step(summary, learning_rate)
                | phase_row(on_e, describe_batch(batch, of)["H"], after, floors[of], first=number == 0)
            )
    out.table(to_table(rows, PHASE), "phase.parquet")
    clipped = [
        {"intervention": entry["intervention"], "phase_step": entry["number"] + 1} | row
        for entry in steps
        for row in entry["step"].table("clipped.parquet").to_pylist()
    ]
    out.table(to_table(clipped, CLIPPED), "clipped.parquet")
    return {"rows": len(rows), "steps": len(steps), "clipped": len(clipped)}
