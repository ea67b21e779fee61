"""Whether a sweep looks like the run that it probes: sentences for the top of the report, and its section."""

import math
from collections.abc import Sequence
from itertools import pairwise

from entropy_core.estimates.selection import Row, at_learning_rate, by_checkpoint, first_of_each
from entropy_core.report.markdown import markdown_rows

NAMES = {
    "entropy": "entropy per token",
    "mean_reward": "mean reward",
    "equal_reward_fraction": "share of prompts with equal rewards",
    "mean_length": "mean response length",
    "truncated_fraction": "share of cut responses",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "kl": "KL to the reference",
}
_OF_REWARDS = {"mean_reward", "equal_reward_fraction"}
_OF_RESPONSES = {"entropy", "mean_length", "truncated_fraction"}


def disagreements(rows: Sequence[Row]) -> list[str]:
    """Say what does not look like the trainer's run, in one sentence per quantity and one about the likely cause.

    Args:
        rows: of agreement.parquet.

    Returns:
        Sentences; none where nothing disagrees.
    """
    odd = {name: [r for r in rows if (r["quantity"], r["verdict"]) == (name, "disagrees")] for name in NAMES}
    odd = {name: of_name for name, of_name in odd.items() if of_name}
    if not odd:
        return []
    logged = {name: sum(r["quantity"] == name and r["verdict"] != "not logged" for r in rows) for name in odd}
    said = [_sentence(name, of_name, logged[name]) for name, of_name in odd.items()]
    return [f"This does not look like the trainer's run. {' '.join(said)} {_cause(odd)}"]


def _sentence(name: str, rows: Sequence[Row], logged: int) -> str:
    worst = max(rows, key=lambda row: math.inf if row["z"] is None else abs(row["z"]))
    z = "" if worst["z"] is None else f", z = {worst['z']:+.1f}"
    where = f"{worst['checkpoint']}{z}" if logged == 1 else f"{worst['checkpoint']}{z}; {len(rows)} of {logged}"
    return (
        f"{NAMES[name].capitalize() if name != 'kl' else NAMES[name]}: the trainer logged {worst['trainer']:.4g}, and "
        f"the probe measures {worst['probe']:.4g} ({where})."
    )


def _cause(odd: dict[str, list[Row]]) -> str:
    names = set(odd)
    if mistake := next((row["explained_by"] for row in odd.get("entropy", [])), None):
        temperature = " (1 would fit, too)" if "temperature" in mistake else ""
        return (
            f"What the trainer calls entropy is as large as {mistake}: then it is the log that is not the entropy per "
            f"token, and the settings may be right. Otherwise check generation.temperature{temperature}, the prompts "
            "and the chat template."
        )
    if names == {"entropy"}:
        return (
            "The responses look like the trainer's, and no known mistake of a logged entropy gives its value. Check "
            "generation.temperature, and how the trainer computes it."
        )
    if names & _OF_RESPONSES:
        return (
            "Check the prompts (batch_config.dataset_name, prompt_column), the chat template and system prompt, "
            "generation.temperature and generation.max_new_tokens."
        )
    if names & _OF_REWARDS:
        return "The responses look like the trainer's: check update.reward and the columns it reads, and the prompts."
    if "kl" in names:
        return "Check update.reference."
    if "gradient_norm" in names:
        return "Check update.loss and its settings."
    return "Check update.learning_rate, and that optimizer state and weights are of the same step."


def section(rows: Sequence[Row], results: Sequence[Row]) -> list[str]:
    """Return the section that holds the probe against the trainer's log.

    Args:
        rows: of agreement.parquet.
        results: rows of the result table, of one normalisation.

    Returns:
        Lines of markdown.
    """
    logged = [row for row in rows if row["verdict"] != "not logged"]
    lines: list[str] = []
    if logged:
        head = ("checkpoint", "quantity", "verdict", "trainer", "probe", "standard error", "z")
        lines += markdown_rows(head, [_cells(row) for row in logged], 3)
        lines += [
            "",
            "*Trainer* is a straight line through the ten logged values nearest to the checkpoint, read off at its "
            "step: what a trainer logs is of the policy just before its step, or an average over the steps since it "
            "last logged. *Probe* is measured on other responses. The standard error covers both: the probe's over its "
            "prompts, and that of the line, from the scatter of the logged values, which is the noise of the trainer's "
            "own batches, and from how much they bend. With fewer than four values it is that of a batch of its size, "
            "and the difference of the two nearest values. The probability that anything disagrees in a run that is "
            "right is 1 % for all rows together; differences up to 1 % of the value agree.",
        ]
    if missing := sorted({NAMES[row["quantity"]] for row in rows if row["verdict"] == "not logged"}):
        lines += ["", f"Not logged at one checkpoint or more: {', '.join(missing)}."]
    if changes := _changes(results, rows):
        lines += ["", *changes]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "–" if row[name] is None else format(row[name], form)

    verdict = f"**{row['verdict']}**" if row["verdict"] == "disagrees" else row["verdict"]
    values = (number("trainer", ".4g"), number("probe", ".4g"), number("standard_error", ".2g"), number("z", "+.1f"))
    return (row["checkpoint"], NAMES[row["quantity"]], verdict, *values)


def _of_mean_update(row: Row) -> float:
    """The standard error of δH₁ over E and over U; their interaction is in the errors over either."""
    return max(row["se_given_u"] ** 2 + row["se_over_u"] ** 2 - row["se_interaction"] ** 2, 0.0) ** 0.5


def _changes(results: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The change of H from one checkpoint to the next, beside that of the log and that which δH₁ predicts."""
    of_step = {row["checkpoint"]: row for row in first_of_each(at_learning_rate(results))}
    first = [group[0] for group in by_checkpoint(results).values() if group[0]["checkpoint"] in of_step]
    entropy = {row["checkpoint"]: row["trainer"] for row in rows if row["quantity"] == "entropy"}
    per_token = results[0]["normalization"] == "per_token"
    body = []
    for before, after in pairwise(first):
        steps = after["step"] - before["step"]
        ends = [of_step[row["checkpoint"]] for row in (before, after)]
        predicted = sum(steps / 2 * row["delta_h1"] / row["eta_over_lr"] for row in ends)
        # the checkpoints share the seeds of E and U: their errors may be one error, and then they add up
        predicted_se = sum(steps / 2 * _of_mean_update(row) / row["eta_over_lr"] for row in ends)
        logged = [entropy.get(row["checkpoint"]) for row in (before, after)]
        known = per_token and None not in logged
        body.append(
            (
                f"{before['checkpoint']} → {after['checkpoint']}",
                f"{steps}",
                f"{after['H'] - before['H']:+.4g} ± {math.hypot(before['H_se'], after['H_se']):.2g}",
                f"{logged[1] - logged[0]:+.4g}" if known else "–",  # type: ignore[operator]
                f"{predicted:+.4g} ± {predicted_se:.2g}",
            )
        )
    if not body:
        return []
    return [
        *markdown_rows(("from → to", "steps", "change of H", "of the logged entropy", "δH₁ × steps"), body),
        "",
        "The last column is δH₁ at the learning rate, averaged over the two checkpoints, times the steps between them. "
        "It takes every step to be like those two: what it misses is curvature within a step, and that later steps "
        "differ from these. ± are standard errors. Checkpoints share the seeds of E and U, and their errors are "
        "correlated: that of the sum is for errors that are the same, and that of the difference for independent "
        "ones, so that neither is too small.",
    ]
