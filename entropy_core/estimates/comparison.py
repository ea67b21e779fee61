"""Compare two checkpoints, or two ways to estimate from one: differences with errors, paired on what both share.

A difference of two estimates on one E, or on two whose sequences answer the same prompts, has the influence ψ'_i − ψ_i
of sequence i. Such pairs are independent of each other however alike the two of a pair are, so their standard error is
right whether both policies drew from the same random numbers or not. The prompts of U are paired in the same way.
Without common prompts the errors are independent, and their squares add.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.estimates.batches import halves_of_u, influences
from entropy_core.estimates.intervals import Randomness, intervals
from entropy_core.estimates.selection import Row
from entropy_core.estimates.sides import Side
from entropy_core.estimates.tables import COMPARISON
from entropy_core.numerics import half_samples, uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.half_samples import OverU
from entropy_core.numerics.uncertainty import Estimate

_VALUES = COMPARISON.names[COMPARISON.names.index("value") : COMPARISON.names.index("shared_e")]
SAME_BATCH, SAME_STEP = "same batch", "same step"
SAME_PROMPTS, OTHER_PROMPTS = "same prompts", "other prompts"


def compared(first: Side, other: Side, level: float) -> list[Row]:
    """Compare H, δH₁ and ΔH of two checkpoints, for every normalisation and the first estimator that both have.

    Args:
        first: the one.
        other: the one that is compared with it.
        level: confidence level of the intervals.

    Returns:
        Rows of `tables.COMPARISON`. The changes are at the step size closest to the learning rate that was measured in
        both; without one, δH₁ is at the learning rate, and ΔH is not compared.
    """
    multiple = _common_multiple(first, other)
    estimators = [name for name in first.inputs["estimators"] if name in other.inputs["estimators"]]
    shared: dict[str, Any] = {
        "run": first.run,
        "other_run": other.run,
        "step": first.step,
        "checkpoint": first.checkpoint,
        "other_checkpoint": other.checkpoint,
        "shared_e": shared_e(first, other),
        "shared_u": shared_u(first, other),
        "confidence_level": level,
    }
    rows: list[Row] = []
    for of in first.settings["normalizations"]:
        if of not in other.settings["normalizations"]:
            continue
        about = shared | {"normalization": of}
        differ = _Differ(first, other, shared["shared_e"], level)
        row = differ(first.entropy(of), other.entropy(of), _unknown("H does not depend on U"))
        rows.append(about | {"quantity": "H", "eta_over_lr": None} | row)
        at = 1.0 if multiple is None else multiple
        over_u = _over_u(first, other, of, at, paired=shared["shared_u"] != OTHER_PROMPTS)
        row = differ(first.first_order(of, at), other.first_order(of, at), over_u)
        rows.append(about | {"quantity": "delta_h1", "eta_over_lr": at} | row)
        if multiple is not None and estimators:
            changes = first.change(of, estimators[0], multiple), other.change(of, estimators[0], multiple)
            same = first.moved_scores(multiple) == other.moved_scores(multiple)  # then rounding is the same, too
            floors = [side.row(of, estimators[0], multiple)["noise_floor"] for side in (first, other)]
            noise = 0.0 if same else math.hypot(*floors) / 2
            row = differ(*changes, _unknown("the variation of the curvature over U is not known"), noise)
            rows.append(about | {"quantity": "delta_h", "eta_over_lr": multiple} | row)
    return rows


def _unknown(why: str) -> OverU:
    return OverU(0.0, 1, 0.0, why)


def shared_e(first: Side, other: Side) -> str:
    """Say what two evaluation batches share: all, the prompts of their sequences, or nothing that can be paired."""
    if first.scored == other.scored:
        return SAME_BATCH
    pools = first.pools[0], other.pools[0]
    return SAME_PROMPTS if _equal(*pools) and first.prompts_e == other.prompts_e else OTHER_PROMPTS


def shared_u(first: Side, other: Side) -> str:
    """Say what two update batches share: the step, the prompts of their sequences, or nothing that can be paired."""
    if first.inputs["update"].digest == other.inputs["update"].digest:
        return SAME_STEP
    pools = first.pools[1], other.pools[1]
    return SAME_PROMPTS if _equal(*pools) and first.prompts_u == other.prompts_u else OTHER_PROMPTS


def _equal(pool: str, other_pool: str) -> bool:
    return pool == other_pool != ""


def _common_multiple(first: Side, other: Side) -> float | None:
    both = {row["eta_over_lr"] for row in first.rows} & {row["eta_over_lr"] for row in other.rows}
    return min((multiple for multiple in both if multiple > 0), key=lambda multiple: abs(multiple - 1), default=None)


def _invalid_over_e(side: Side) -> str:
    said: str = side.rows[0]["interval_over_e"]
    return "" if said == "valid" else said


class _Differ(NamedTuple):
    """How two sides are subtracted: paired by sequence unless their prompts of E are other ones."""

    first: Side
    other: Side
    shared_e: str
    level: float

    def __call__(
        self, estimate: Estimate | None, other_estimate: Estimate | None, over_u: OverU, noise: float = 0.0
    ) -> dict[str, Any]:
        """Return the columns of both values and of their difference; `noise` is a further error of the difference."""
        row: dict[str, Any] = dict.fromkeys(_VALUES)
        for prefix, side, of_side in (("", self.first, estimate), ("other_", self.other, other_estimate)):
            if of_side is not None:
                row |= {f"{prefix}value": of_side.value, f"{prefix}value_se": side.batch.standard_error(of_side)}
        if estimate is None or other_estimate is None:
            return row | {"verdict": "not measured"}
        difference = other_estimate.value - estimate.value
        if self.shared_e == OTHER_PROMPTS:
            units = self.first.batch.units, self.other.batch.units
            total = uncertainty.total_standard_error(row["value_se"], units[0], row["other_value_se"], units[1])
            error, count = total.standard_error, int(total.degrees_of_freedom) + 1
        else:
            influence_N = other_estimate.minus(estimate).influence_N
            by_prompt = "prompt" in (self.first.settings["units"], self.other.settings["units"])
            clusters_N = torch.tensor(self.first.prompts_e) if by_prompt else None
            error = uncertainty.standard_error(influence_N, clusters_N)
            count = len(uncertainty.cluster_sums(influence_N, clusters_N))
        error = math.hypot(error, noise)
        invalid = _invalid_over_e(self.first) or _invalid_over_e(self.other)
        ends, _ = intervals("", difference, error, Randomness(count, over_u, invalid), 1.0, self.level)
        low, high = ends["this_update_low"], ends["this_update_high"]
        verdict = "cannot tell"
        if difference == error == 0:
            verdict = "equal"
        elif low is not None:
            verdict = "higher" if low > 0 else "lower" if high < 0 else verdict
        return row | {"difference": difference, "difference_se": error, **ends, "verdict": verdict}


class _OfU(NamedTuple):
    """What the randomness of U does to δH₁ of one side, or to the difference of two."""

    value: float
    whole_PG: Tensor
    halves_2PG: Tensor
    halves_R2: Tensor
    prompts_R2: Tensor
    informative: int
    fresh: bool
    no_interval: str

    def minus(self, other: "_OfU") -> "_OfU":
        """The same of the difference, where both have the same prompts."""
        splits = len(self.halves_R2) if len(self.halves_R2) == len(other.halves_R2) else 0  # a loss may leave some out
        return _OfU(
            self.value - other.value,
            self.whole_PG - other.whole_PG,
            self.halves_2PG - other.halves_2PG,
            self.halves_R2[:splits] - other.halves_R2[:splits],
            self.prompts_R2[:splits],
            min(self.informative, other.informative),
            self.fresh or other.fresh,
            self.no_interval or other.no_interval,
        )

    @property
    def over_u(self) -> OverU:
        """The standard error over U."""
        steps = half_samples.half_steps(
            self.value, self.halves_R2, self.prompts_R2, fresh=self.fresh, no_interval=self.no_interval
        )
        linearised = uncertainty.clustered_sum_standard_error(self.whole_PG)
        interaction = uncertainty.interaction_variance(self.whole_PG.sum(1), self.halves_2PG.sum(2))
        return half_samples.over_u(linearised, interaction, steps, len(self.whole_PG), self.informative)


def _of_u(side: Side, normalization: Normalization, multiple: float) -> _OfU:
    eta = multiple * side.inputs["learning_rate"]
    first_order, halves, update = (side.inputs[name] for name in ("first_order_u", "half_steps_u", "update"))
    prompts = update.summary["prompts"]
    whole_PG, halves_2PG = influences(first_order.table("sequences.parquet"), normalization, prompts)
    halves_R2, prompts_R2 = halves_of_u(halves.table("halves.parquet"), normalization)
    return _OfU(
        eta * first_order.summary["inner_product"][normalization],
        eta * whole_PG,
        eta * halves_2PG,
        eta * halves_R2,
        prompts_R2,
        prompts - update.summary["prompts_with_equal_rewards"],
        halves.summary["fresh"],
        halves.summary["no_interval"],
    )


def _over_u(first: Side, other: Side, normalization: Normalization, multiple: float, paired: bool) -> OverU:
    """The standard error over U of the difference of δH₁."""
    one, another = (_of_u(side, normalization, multiple) for side in (first, other))
    if paired:
        return another.minus(one).over_u
    a, b = one.over_u, another.over_u
    error = math.hypot(a.standard_error, b.standard_error)
    freedom = min(a.degrees_of_freedom, b.degrees_of_freedom)
    return OverU(error, freedom, a.interaction + b.interaction, a.invalid or b.invalid)
