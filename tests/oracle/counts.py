"""From replications to counts: how often an interval held what it is for, and how often a verdict was false."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch

from entropy_core.numerics.multiple_tests import benjamini_hochberg, holm
from oracle.replicas import ETAS, Replica

UPDATES = ("this", "mean", "next")
QUANTITIES = {"delta_h1": ("", "first"), "delta_h12": ("delta_h12_", "second"), "delta_h": ("delta_h_", "change")}
MATERIAL = 0.05  # the stated share of δH₁ up to which a change is linear
LEARNING_RATE, SMALLEST = ETAS.index(1.0), 0
LEVEL, FAMILY, FAMILIES = 0.05, 5, 4000  # a family is of five tests whose hypothesis is true, and five others

Counts = dict[str, Any]


def counted(found: Sequence[Replica]) -> Counts:
    """Count what is right. Replications are independent: the next U of each is that of the one after it."""
    count = len(found)
    means = {
        name: [sum(getattr(one.truth, name)[i] for one in found) / count for i in range(len(ETAS))]
        for name in ("first", "second", "change")
    }
    held: Counter[str] = Counter()
    given: Counter[str] = Counter()
    false: Counter[str] = Counter()
    claims: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for this, following in zip(found, [*found[1:], found[0]], strict=True):
        for i, multiple in enumerate(ETAS):
            row, at = this.rows[i], f"{multiple:g}"
            for quantity, (prefix, name) in QUANTITIES.items():
                targets = (getattr(one, name)[i] for one in (this.truth, following.truth))
                of_this, of_next = targets
                for update, target in zip(UPDATES, (of_this, means[name][i], of_next), strict=True):
                    low, high = (row[f"{prefix}{update}_update_{end}"] for end in ("low", "high"))
                    if low is None or (quantity == "delta_h" and not row["weights_reliable"]):
                        continue
                    key = f"{quantity} {update} {at}"
                    given[key] += 1
                    held[key] += low <= target <= high
            false.update(f"{kind} {at}" for kind in _false(this, following, means["change"][i], i))
            verdicts[f"{row['verdict']} {at}"] += 1
        for column in ("interval_over_e", "interval_over_u"):
            claims[f"{column}: {_reason(this.rows[LEARNING_RATE][column])}"] += 1
    at_lr = [one.rows[LEARNING_RATE] for one in found]
    return {
        "replications": count,
        "held": dict(held),
        "given": dict(given),
        "false": dict(false),
        "claims": dict(claims),
        "verdicts": dict(verdicts),
        "p_values": {
            update: [_rounded(one.rows[SMALLEST][f"p_{update}_update"]) for one in found] for update in ("this", "mean")
        },
        "medians": {
            "ess": [_median(row["ess_fraction"] for row in at_lr)],
            "bent": [_median(row["nonlinearity_over_u"] or 0.0 for row in at_lr)],
            "curved": [_median(_distance(one.truth.change, one.truth.first) for one in found)],
            "left": [_median(_distance(one.truth.change, one.truth.second) for one in found)],
        },
    }


def _distance(changes: Sequence[float], predictions: Sequence[float]) -> float:
    """The distance of a prediction at the learning rate from the change, relative to it."""
    change, predicted = changes[LEARNING_RATE], predictions[LEARNING_RATE]
    return abs(predicted / change - 1) if change else float(predicted != 0)


def _false(this: Replica, following: Replica, mean_change: float, i: int) -> list[str]:
    """Verdicts of a row that are not so."""
    row, truth = this.rows[i], this.truth
    first, change = truth.first[i], truth.change[i]
    wrong = [
        f"sign of {update}"
        for update, target in zip(UPDATES, (change, mean_change, following.truth.change[i]), strict=True)
        if row[f"sign_{update}_update"] not in ("unknown", "positive" if target > 0 else "negative")
    ]
    beyond = abs(change - first) > MATERIAL * abs(first)
    if (row["linearity"] == "linear" and beyond) or (row["linearity"] == "nonlinear" and not beyond):
        wrong.append(row["linearity"])
    if row["verdict"] == "resolved" and "sign of this" in wrong:
        wrong.append("resolved")
    if row["second_order"] == "resolved" and row["delta_h2"] * (truth.second[i] - first) < 0:
        wrong.append("second order")
    if row["above_rounding"] and abs(change) <= row["noise_floor"] / 2:
        wrong.append("above rounding")
    return wrong


def _reason(said: str) -> str:
    """A reason without its numbers, so that equal ones are counted together."""
    said = said.partition("; ")[0].replace("no valid interval over E: ", "").replace("no valid interval over U: ", "")
    for start, short in REASONS.items():
        if start in said:
            return short
    return said


REASONS = {
    "prompts of U have unequal rewards": "fewer than 8 prompts with unequal rewards",
    "not linear in the gradient, and": "a step that is not linear, and fewer than 16 prompts",
    "has made no step yet": "the first step of the optimizer",
    "cannot know what follows": "tokens that E never took",
}


def _median(values: Iterable[float]) -> float:
    return float(f"{median(values):.4g}")


def _rounded(p: float | None) -> float | None:
    return None if p is None else float(f"{p:.4g}")


def merged(one: Counts, other: Counts) -> Counts:
    """The counts of both, of other replications of the same scenario."""
    found = dict(one)
    for name in ("held", "given", "false", "claims", "verdicts"):
        found[name] = dict(Counter(one[name]) + Counter(other[name]))
    for name in ("p_values", "medians"):
        found[name] = {key: one[name][key] + other[name][key] for key in one[name]}
    found["replications"] = one["replications"] + other["replications"]
    found["seconds"] = one.get("seconds", 0.0) + other.get("seconds", 0.0)
    return found


def share(counts: Counts, quantity: str, update: str, multiple: float = 1.0) -> tuple[int, int]:
    """How many intervals held, of how many."""
    key = f"{quantity} {update} {multiple:g}"
    return counts["held"].get(key, 0), counts["given"].get(key, 0)


def by_chance(held: int, given: int, level: float = 0.95, deviations: float = 3.0) -> bool:
    """Whether a share is within so many standard errors of the level."""
    return given == 0 or abs(held / given - level) <= deviations * math.sqrt(level * (1 - level) / given)


def families(null: Counts, others: Counts, update: str) -> dict[str, float]:
    """What adjusted p-values of a sweep of ten checkpoints do: five change nothing, five are like another scenario.

    Families are drawn from the replications of both.
    """
    true, alike = ([p for p in one["p_values"][update] if p is not None] for one in (null, others))
    if not true or not alike:
        return {}
    generator = torch.Generator().manual_seed(0)
    any_false, discoveries, found = Counter[str](), Counter[str](), Counter[str]()
    for _ in range(FAMILIES):
        picks = (torch.randint(len(of), (FAMILY,), generator=generator).tolist() for of in (true, alike))
        p_values = [of[i] for of, chosen in zip((true, alike), picks, strict=True) for i in chosen]
        for name, adjust in (("single", list), ("holm", holm), ("benjamini_hochberg", benjamini_hochberg)):
            rejected = [p <= LEVEL for p in adjust(p_values)]
            wrong = sum(rejected[:FAMILY])
            any_false[name] += wrong > 0
            discoveries[name] += wrong / max(sum(rejected), 1)
            found[name] += sum(rejected[FAMILY:])
    return {
        "p below 5 %": sum(p <= LEVEL for p in true) / len(true),
        "any false, without": any_false["single"] / FAMILIES,
        "any false, Holm": any_false["holm"] / FAMILIES,
        "false share, Benjamini-Hochberg": discoveries["benjamini_hochberg"] / FAMILIES,
        "found, Holm": found["holm"] / FAMILIES / FAMILY,
        "found, Benjamini-Hochberg": found["benjamini_hochberg"] / FAMILIES / FAMILY,
    }
