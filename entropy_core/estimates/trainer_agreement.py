"""Hold what a trainer logged near a checkpoint against what the probe measures of the same quantity.

The trainer's value is a straight line through its logged values near the checkpoint, read off at the checkpoint's step:
the entry of step s is about the policy after s − 1 steps, or an average over the policies since the entry before it.
The probe's value is of other responses, often to other prompts. So the standard error has two parts: that of the probe,
over its prompts, and that of the line, from the scatter of the logged values about it, which is the trainer's own batch
noise.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.logged_entropy import Sampling, entropy_per_token, known_mistakes
from entropy_core.estimates.responses import Responses, together
from entropy_core.numerics import trend, uncertainty

QUANTITIES = {
    "entropy": "entropy",
    "mean_reward": "reward",
    "equal_reward_fraction": "frac_reward_zero_std",
    "mean_length": "completions/mean_length",
    "truncated_fraction": "completions/clipped_ratio",
    "gradient_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "kl": "kl",
}
"""Names of the trainer, by ours."""
LONGEST = "completions/max_length"
ENTRIES = 10
"""Logged values that the line goes through."""

FALSE_ALARMS = 0.01
"""Probability that anything is called out in a run that is right, over all comparisons of the run together."""
SMALLEST = 0.01
"""Relative difference up to which values agree: another number format alone can make as much."""

MOST_NAMED = 3
"""Mistakes that are named of those that fit."""

_OF_ONE_STEP = ("gradient_norm", "learning_rate")  # not averaged over the steps since the last entry
_SAMPLED = ("mean_reward", "equal_reward_fraction", "mean_length", "truncated_fraction")


Terms = tuple[torch.Tensor, torch.Tensor]
"""Numerator and denominator of each response, float64 [N]."""


class Probed(NamedTuple):
    """A quantity as the probe measures it.

    Attributes:
        value: in the quantity's own unit.
        standard_error: over prompts; None where there is none.
        degrees_of_freedom: of the standard error.
        of_one_batch: standard error of a single batch of the trainer.
        comparable: False where the trainer's value is of batches or groups of another size.
    """

    value: float
    standard_error: float | None = None
    degrees_of_freedom: float = math.inf
    of_one_batch: float = 0.0
    comparable: bool = True


class Compared(NamedTuple):
    """One row: both values, and what their difference means."""

    checkpoint: str
    step: int
    quantity: str
    trainer: float | None
    probe: float
    standard_error: float | None = None
    degrees_of_freedom: float = math.inf
    tolerance: float | None = None  # in the place of a standard error

    @property
    def z(self) -> float | None:
        """(probe − trainer) in standard errors; None where there is none."""
        if not self.standard_error or self.trainer is None:
            return None
        return (self.probe - self.trainer) / self.standard_error

    def verdict(self, false_alarms: float) -> str:
        """Say whether they agree, when a right value is to be called out with this probability."""
        if self.trainer is None:
            return "not logged"
        difference = abs(self.probe - self.trainer)
        if self.tolerance is not None:
            return "agrees" if difference <= self.tolerance else "disagrees"
        if self.standard_error is None:
            return "not comparable"
        limit = self.standard_error * t_quantile(1 - false_alarms / 2, self.degrees_of_freedom)
        return "agrees" if difference <= max(limit, SMALLEST * abs(self.trainer)) else "disagrees"


def measured(
    e: Responses | None,
    u: Responses,
    rewards_N: torch.Tensor,
    kl_N: torch.Tensor | None,
    update: Mapping[str, Any],
    log: Mapping[str, Any],
    learning_rate: float,
) -> dict[str, Probed]:
    """Measure every quantity that a trainer logs.

    Args:
        e: responses of E; None where its prompts are of another split than the trainer's.
        u: responses of U, by prompt.
        rewards_N: of the responses of U, float64 [N].
        kl_N: sum of the KL terms of each response of U, float64 [N]; None without a reference.
        update: summary of compute-update.
        log: what is known of the trainer, as `compared` takes it.
        learning_rate: of the next step.

    Returns:
        By the names of `QUANTITIES`; `kl` only where it is measured, and nothing that is about no response at all.
    """
    both = together([u, e]) if e is not None else u
    prompts = int(u.prompts_N.unique().numel())
    of_trainer = log["prompts"] or prompts
    group = len(u) // prompts
    same_group = log["responses_per_prompt"] in (0, group)
    same_batch = same_group and of_trainer == prompts
    without_spread = float((_spread(rewards_N, group) == 0).sum())
    by_group = same_group and update["loss"]["scale_rewards"] != "batch"  # else TRL logs it of the whole batch
    without_cut = update["loss"]["mask_truncated_completions"]  # which the trainer then logs the entropy and KL of
    kept_u, kept = (of.chosen(~of.cut_N) if without_cut else of for of in (u, both))

    def length(of: Responses) -> Terms:
        return of.lengths_N, torch.ones_like(of.lengths_N)

    def cut(of: Responses) -> Terms:
        return of.cut_N.double(), torch.ones_like(of.lengths_N)

    found = {
        "mean_reward": _ratio(u, (rewards_N, torch.ones_like(rewards_N)), of_trainer),
        "equal_reward_fraction": _share(without_spread, prompts, of_trainer)._replace(comparable=by_group),
        "mean_length": _on_both(u, both, length, of_trainer),
        "truncated_fraction": _at_least(
            _on_both(u, both, cut, of_trainer), _share(float(both.cut_N.sum()), len(both), of_trainer * group)
        ),
        "gradient_norm": Probed(update["gradient_norm"], comparable=same_batch),
        "learning_rate": Probed(learning_rate),
    }
    if len(kept):
        found = {"entropy": _on_both(kept_u, kept, lambda of: (of.entropy_N, of.lengths_N), of_trainer)} | found
    if kl_N is not None and len(kept_u):
        kept_N = kl_N[~u.cut_N] if without_cut else kl_N
        found["kl"] = _ratio(kept_u, (kept_N, kept_u.lengths_N), of_trainer)
    return found


def _ratio(of: Responses, terms: Terms, of_trainer: int) -> Probed:
    """A ratio of two means over responses, with its error over prompts."""
    estimate = uncertainty.ratio(*map(uncertainty.mean, terms))
    units = len(of.prompts_N.unique())
    if units < 2:
        return Probed(estimate.value)
    error = uncertainty.standard_error(estimate.influence_N, of.prompts_N)
    return Probed(estimate.value, error, units - 1, error * math.sqrt(units / of_trainer))


def _on_both(u: Responses, both: Responses, terms: Callable[[Responses], Terms], of_trainer: int) -> Probed:
    """The same on U and E together; what one batch of the trainer varies by shows on U, whose groups are as large."""
    of_one_batch = _ratio(u, terms(u), of_trainer).of_one_batch if len(u) else 0.0
    return _ratio(both, terms(both), of_trainer)._replace(of_one_batch=of_one_batch)


def _spread(rewards_N: torch.Tensor, group: int) -> torch.Tensor:
    rewards_PG = rewards_N.view(-1, group)
    return rewards_PG.amax(dim=1) - rewards_PG.amin(dim=1)


def _share(count: float, of: int, of_trainer: int) -> Probed:
    """A share, with the error of one that was seen two more times among four more: never 0, whatever was counted."""
    smoothed = (count + 2) / (of + 4)
    variance = smoothed * (1 - smoothed)
    return Probed(count / of, math.sqrt(variance / of), max(of - 1, 1), math.sqrt(variance / of_trainer))


def _at_least(one: Probed, other: Probed) -> Probed:
    """The first with the larger standard errors of the two."""
    assert other.standard_error is not None
    return one._replace(
        standard_error=max(one.standard_error or 0.0, other.standard_error),
        degrees_of_freedom=min(one.degrees_of_freedom, other.degrees_of_freedom),
        of_one_batch=max(one.of_one_batch, other.of_one_batch),
    )


def compared(checkpoint: str, step: int, probed: Mapping[str, Probed], log: Mapping[str, Any]) -> list[Compared]:
    """Hold the measured quantities of one checkpoint against the trainer's log.

    Args:
        checkpoint: its name.
        step: the trainer's steps until it was saved.
        probed: of `measured`.
        log: `entries`, those near the checkpoint, each with its `step`, `since` (step of the entry before it) and what
            was logged, by the trainer's names; `prompts` and `responses_per_prompt` of a step, 0 where not known.

    Returns:
        One row per quantity.
    """
    rows = []
    for quantity, of_probe in probed.items():
        times, values, spans = near(log["entries"], quantity, step)
        row = Compared(checkpoint, step, quantity, None, of_probe.value)
        if not values:
            rows.append(row)
        elif quantity == "learning_rate":
            changes = [abs(value - values[0]) for value in values[1:3]]  # the schedule may go on like that
            tolerance = max(changes) + 1e-6 * abs(values[0]) if changes else None
            rows.append(row._replace(trainer=values[0], tolerance=tolerance))
        else:
            rows.append(_with_error(row, of_probe, times, values, spans, step))
    return rows


def near(
    entries: Sequence[Mapping[str, float]], quantity: str, step: int
) -> tuple[list[float], list[float], list[float]]:
    """The logged values of a quantity that are nearest to a step, nearest first.

    Args:
        entries: of the log.
        quantity: one of `QUANTITIES`.
        step: of the checkpoint.

    Returns:
        For each value: after how many steps the policy was that it is about; the value; over how many policies it is
        averaged.
    """
    found = []
    for entry in entries:
        if (value := entry.get(QUANTITIES[quantity])) is not None:
            span = 1 if quantity in _OF_ONE_STEP else entry["step"] - entry["since"]
            time = entry["step"] - (span + 1) / 2
            found.append((abs(time - step), -time, value, span))
    found = sorted(found)[:ENTRIES]
    return [-time for _, time, _, _ in found], [value for _, _, value, _ in found], [span for *_, span in found]


def _with_error(
    row: Compared, probed: Probed, times: list[float], values: list[float], spans: list[float], step: int
) -> Compared:
    own, freedom = probed.standard_error, probed.degrees_of_freedom
    if len(values) >= trend.FEWEST:
        line = trend.level_at(times, values, step)
        trainer, variance, of_line = line.value, line.standard_error**2, line.degrees_of_freedom
        if row.quantity == "gradient_norm":  # the probe's is of one batch, whose noise is that of one logged value
            own, freedom = line.scatter, of_line
    else:  # too few to tell their scatter: that of a batch as large as the trainer's, and how far the next one is
        drift = abs(values[1] - values[0]) if len(values) > 1 else 0.0
        trainer, variance, of_line = values[0], probed.of_one_batch**2 / spans[0] + drift**2, freedom
    if own is None or not probed.comparable:
        return row._replace(trainer=trainer)
    total = variance + own**2
    parts = variance**2 / of_line + own**4 / freedom
    return row._replace(
        trainer=trainer,
        standard_error=math.sqrt(total),
        degrees_of_freedom=max(1.0, total**2 / parts) if parts else math.inf,  # Welch and Satterthwaite
    )


Logging = Callable[[str], tuple[Responses, Sampling]]
"""By the name of a checkpoint: the responses that the entropy is measured on, and how the trainer samples and logs."""


def rows_of(found: Sequence[Compared], logging: Logging) -> Iterator[dict[str, Any]]:
    """Give every comparison of a run its verdict, and name the mistake that explains a logged entropy.

    The probability of a false alarm is shared out evenly among the comparisons of the run.

    Args:
        found: of `compared`, of all checkpoints.
        logging: is called where a logged entropy is to be explained.

    Yields:
        Rows of `agreement.parquet`.
    """
    number = sum(row.standard_error is not None for row in found)
    each = FALSE_ALARMS / max(number, 1)
    verdicts = [row.verdict(each) for row in found]
    odd = {row.quantity for row, verdict in zip(found, verdicts, strict=True) if verdict == "disagrees"}
    entropies = [row for row, v in zip(found, verdicts, strict=True) if (row.quantity, v) == ("entropy", "disagrees")]
    mistake = None if odd & set(_SAMPLED) or not entropies else _explained(entropies, logging, each)
    for row, verdict in zip(found, verdicts, strict=True):
        yield {
            **{name: getattr(row, name) for name in ("checkpoint", "step", "quantity", "trainer", "probe")},
            "standard_error": row.standard_error,
            "z": row.z,
            "verdict": verdict,
            "explained_by": mistake if (row.quantity, verdict) == ("entropy", "disagrees") else None,
        }


def _explained(rows: Sequence[Compared], logging: Logging, false_alarms: float) -> str | None:
    """The mistakes that agree with what was logged at every checkpoint, nearest first: one number may fit several.

    Of a mistake with bounds the middle counts: one that says exactly what was logged explains more.
    """
    distance: dict[str, float] = {}
    agreed: dict[str, int] = {}
    for row in rows:
        assert row.trainer is not None and row.standard_error is not None
        responses, sampling = logging(row.checkpoint)
        own = entropy_error(responses)
        of_trainer = math.sqrt(max(row.standard_error**2 - own**2, 0.0))
        for logged in known_mistakes(responses, sampling):
            error = math.hypot(of_trainer, logged.standard_error)
            apart = max(abs(logged.value - row.trainer) - logged.within, 0.0)
            limit = error * t_quantile(1 - false_alarms / 2, row.degrees_of_freedom)
            if apart <= max(limit, SMALLEST * abs(row.trainer)):
                agreed[logged.what] = agreed.get(logged.what, 0) + 1
                distance[logged.what] = distance.get(logged.what, 0.0) + abs(logged.value - row.trainer)
    possible = [what for what, times in agreed.items() if times == len(rows)]
    return ", or ".join(sorted(possible, key=lambda what: distance[what])[:MOST_NAMED]) or None


def entropy_error(of: Responses) -> float:
    """The standard error of the entropy per token, over prompts."""
    return uncertainty.standard_error(entropy_per_token(of).influence_N, of.prompts_N)
