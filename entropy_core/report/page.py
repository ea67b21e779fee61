"""The report page of a sweep, as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_core.estimates.selection import Row, at_learning_rate, best_prediction, first_of_each, interval_of
from entropy_core.report import derivative_error, evaluation_batch, phase, rehearsal
from entropy_core.report.agreement import disagreements
from entropy_core.report.agreement import section as agreement_section
from entropy_core.report.answer import answer
from entropy_core.report.contents import (
    NO_PRICES,
    NONE_TRIED,
    NOT_DISSECTED,
    NOT_FOLLOWED,
    OF_TRAINING,
    OfTraining,
    OnRollout,
    Prices,
    StepTaken,
    Tried,
)
from entropy_core.report.interventions import section as intervention_section
from entropy_core.report.markdown import markdown_rows
from entropy_core.report.post_mortem import section as post_mortem_section
from entropy_core.report.price import section as price_section
from entropy_core.report.sections import SECTIONS, settings_table
from entropy_core.report.verdict_lines import interval, order_lines, verdict_lines

COLUMNS = {
    "checkpoint": "checkpoint",
    "eta_over_lr": "η / lr",
    "estimator": "estimator",
    "H": "H",
    "delta_h1": "δH₁",
    "this_update": "δH₁, this update",
    "mean_update": "δH₁, mean update",
    "next_update": "δH₁, next update",
    "delta_h12": "δH₁ + δH₂",
    "delta_h12_this_update": "δH₁ + δH₂, this update",
    "delta_h12_next_update": "δH₁ + δH₂, next update",
    "delta_h": "ΔH",
    "delta_h_this_update": "ΔH, this update",
    "delta_h_next_update": "ΔH, next update",
    "paired_difference": "ΔH − δH₁",
    "paired_difference_se": "SE",
    "ess_fraction": "ESS/N",
    "verdict": "verdict",
}
INTERVALS = {
    f"{prefix}{update}_update" for prefix in ("", "delta_h12_", "delta_h_") for update in ("this", "mean", "next")
}
CONVENTION = (
    "Brackets, bands and bars are intervals at the confidence level, and name what they are for: *this update*, the "
    "step on this U, with the randomness of E; *the mean update*, the mean step on batches like U, with that of E and "
    "U; *the next update*, the step on another U, with that of E, U and the other U. A standard error is marked SE. "
)


def markdown(
    name: str,
    rows: Sequence[Row],
    tables: Mapping[str, Sequence[Row]],
    notes: Sequence[str],
    training: OfTraining = OF_TRAINING,
    interventions: Tried = NONE_TRIED,
    prices: Prices = NO_PRICES,
    rollout: OnRollout = NOT_FOLLOWED,
    taken: StepTaken = NOT_DISSECTED,
    rehearsed: Sequence[Row] = (),
) -> str:
    """Write the report page of a sweep.

    Args:
        name: name of the sweep.
        rows: rows of the result table.
        tables: rows of the other tables, by the names of `tables.TABLES`.
        notes: assumptions, one sentence each.
        training: what is known of the training.
        interventions: what was tried.
        prices: what the entropy costs in reward.
        rollout: the steps on one rollout.
        taken: the step that the trainer took.
        rehearsed: rows of `rehearsal.parquet`.

    Returns:
        Markdown; figures are linked by file name.
    """
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    priced, tried, followed, dissected, rehearsed = (
        [row for row in of if row["normalization"] == normalization]
        for of in (prices.rows, interventions.rows, rollout.rows, taken.rows, rehearsed)
    )
    first, contradicted = shown[0], disagreements(training.compared)
    lines = [
        f"# {name}: what one optimizer step does to the entropy",
        "",
        *(
            f"> **Warning:** {warning}\n"
            for warning in (
                *evaluation_batch.invalid_over_e(shown),
                *contradicted,
                *derivative_error.warnings(shown),
                *training.warnings,
            )
        ),
        answer(shown, bool(contradicted), priced, tried, followed, rehearsed),
        "",
        f"{len(checkpoints)} checkpoint(s), E of {first['n_sequences']} sequences, U of {first['n_prompts_u']} "
        f"prompts. Entropies in nats ({normalization}); intervals at {percent(first['confidence_level'])}.",
        "",
        *_headlines(shown),
        "",
        *_interventions(tried, interventions.skipped),
        "![predicted against measured entropy change](prediction.png)",
        "",
        "![measured as a part of the predicted entropy change, against step size](eta_sweep.png)",
        "",
        "![entropy, and its change by the next step, along the training](training.png)",
        "",
        "## Where the change comes from",
        "",
        *_origins(shown),
        "",
        "The four middle columns add up to δH₁, and so do the last two. *Local* is the change of the entropy at each "
        "token of E for a fixed prefix; *future* is the effect of changed token choices on the entropy of later ones.",
        "",
        f"The tokens of U that lower the entropy most, and the tokens that raise it most, for {checkpoints[-1]}:",
        "",
        "![the tokens that move the entropy most](tokens.png)",
        "",
        "## Results",
        "",
        markdown_table(shown),
        "",
        "δH₁ is the first-order prediction η·⟨∇H, v⟩, δH₂ the second order ½η²·∂²_vH, and ΔH the change measured by "
        "importance sampling. "
        f"{CONVENTION}δH₁ and ΔH use the same E batch and share its noise: their agreement shows that the step is in "
        "the linear range, not that δH₁ is accurate. The intervals show how accurate δH₁ is.",
        *_without_interval(shown),
        "",
        "## First and second order",
        "",
        *order_lines(shown),
        "",
        "## Verdicts",
        "",
        *verdict_lines(shown),
        "",
        "## Checks",
        "",
        *_checks(shown, checkpoints),
    ]
    if content := post_mortem_section(dissected, taken.samplers):
        lines += ["", "## The step that was taken", "", *content]
    if content := price_section(priced, prices.without_reward, prices.bought):
        lines += ["", "## The price of the entropy", "", *content]
    if content := phase.section(followed, rollout.clipped):
        lines += ["", "## The steps on one rollout", "", *content]
    if content := rehearsal.section(rehearsed):
        lines += ["", "## The rehearsal", "", *content]
    if content := evaluation_batch.section(shown):
        lines += ["", "## How E was drawn", "", *content]
    if content := derivative_error.section(shown):
        lines += ["", "## How exact the derivatives are", "", *content]
    if content := agreement_section(training.compared, shown):
        lines += ["", "## Does this look like the trainer's run?", "", *content]
    for title, section in SECTIONS.items():
        content = section({t: [r for r in some if r["normalization"] == normalization] for t, some in tables.items()})
        if content:
            lines += ["", f"## {title}", "", *content]
    uninformative = max(row["equal_reward_fraction"] for row in shown)
    if uninformative >= 0.9:
        lines += [
            "",
            f"**Up to {uninformative:.0%} of the prompts of U have equal rewards** and carry no information about the "
            "variation over U. Use a larger U, or other prompts.",
        ]
    if training.settings:
        lines += ["", "## Settings of the training", "", *settings_table(training.settings)]
    if notes:
        lines += ["", "## Assumptions", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _interventions(rows: Sequence[Row], skipped: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    content = intervention_section(rows, skipped)
    return ["## What would change it", "", *content, "", "## Predicted and measured", ""] if content else []


def markdown_table(rows: Sequence[Row]) -> str:
    """Format the main columns of result rows as a markdown table, rounded."""
    head = "| " + " | ".join(COLUMNS.values()) + " |"
    rule = "|" + "|".join("---" if name in {"checkpoint", "estimator", "verdict"} else "---:" for name in COLUMNS) + "|"
    body = ["| " + " | ".join(_cell(name, row) for name in COLUMNS) + " |" for row in rows]
    return "\n".join([head, rule, *body])


def _cell(name: str, row: Row) -> str:
    return interval(row, name) if name in INTERVALS else format_value(name, row[name])


def format_value(name: str, value: Any) -> str:
    """Format a cell of the result table, rounded for display."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    if name in {"H", "ess_fraction"}:
        return f"{value:.3f}"
    if name == "eta_over_lr":
        return f"{value:g}"
    if value == 0:
        return "0"
    return f"{value:.3g}" if name.endswith("_se") or name.startswith("se_") else f"{value:+.4g}"


def percent(level: float) -> str:
    """Format a confidence level, with all of its digits."""
    return f"{100 * level:.10g} %"


def _headlines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in first_of_each(at_learning_rate(rows)):
        measured = "not measurable"
        if row["delta_h"] is not None:
            measured = f"{row['delta_h']:+.3g} {interval(row, 'delta_h_this_update')}"
        best = best_prediction(row)
        over_u = row["interval_over_u" if best == "delta_h1" else "delta_h12_interval_over_u"]
        following = f"the next one {interval(row, interval_of(best, 'next'))}" if over_u == "valid" else over_u
        what = "δH₁" if best == "delta_h1" else "δH₁ + δH₂"
        lines.append(
            f"- **{row['checkpoint']}**: H = {row['H']:.4f}; this step of {row['eta_over_lr']:g} × lr changes it by "
            f"{what} = {row[best]:+.3g} {interval(row, interval_of(best, 'this'))}, {following}; measured for this "
            f"step: {measured} ({row['verdict']})"
        )
    return lines


def _without_interval(rows: Sequence[Row]) -> list[str]:
    """Return a line for each checkpoint without a valid interval over U."""
    why = {row["checkpoint"]: row["interval_over_u"] for row in rows if row["interval_over_u"] != "valid"}
    return [line for name, reason in why.items() for line in ("", f"**{name}: {reason}.**")]


def _origins(rows: Sequence[Row]) -> list[str]:
    head = (
        "checkpoint",
        "δH₁",
        "from U's gradient",
        "from momentum",
        "from weight decay",
        "from rounding",
        "local on E",
        "future on E",
    )
    body = []
    for row in first_of_each(at_learning_rate(rows)):
        others = (row["delta_h1_momentum"], row["delta_h1_decay"], row["delta_h1_rounding"])
        parts = (row["inner_product"] - sum(others), *others)
        on_e = (row["delta_h1_local"], row["delta_h1"] - row["delta_h1_local"])
        cells = [f"{value:+.3g}" for value in (row["delta_h1"], *parts, *on_e)]
        body.append((row["checkpoint"], *cells))
    return markdown_rows(head, body)


def _checks(rows: Sequence[Row], checkpoints: Sequence[str]) -> list[str]:
    head = (
        "checkpoint",
        "⟨∇H, v⟩ against forward mode",
        "attribution closure",
        "mean score z",
        "largest noise floor",
        "kurtosis",
        "largest influence",
        "smallest prefix ESS",
        "cut responses",
        "clip factor",
        "equal rewards",
    )
    body = []
    for checkpoint in checkpoints:
        group = [row for row in rows if row["checkpoint"] == checkpoint]
        row, noise = group[0], max(row["noise_floor"] for row in group)
        cells = (
            f"{row['gradient_check']:.1e}",
            f"{row['attribution_closure']:.1e}",
            f"{row['mean_score_z']:+.2f}",
            f"{noise:.1e}",
            f"{row['excess_kurtosis']:.1f}",
            f"{row['largest_influence']:.2%}",
            f"{min((r['ess_prefix'] for r in group if r['verdict'] != 'weights-unreliable'), default=0.0):.0f}",
            f"{row['truncated_fraction']:.1%}",
            f"{row['clip_factor']:.3f}",
            f"{row['equal_reward_fraction']:.0%}",
        )
        body.append((checkpoint, *cells))
    return markdown_rows(head, body)
