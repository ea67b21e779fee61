"""The section of the report on the phase: the optimizer steps on one rollout, and the tokens that they clip."""

from collections import Counter
from collections.abc import Sequence

from entropy_core.estimates.selection import Row, by_checkpoint
from entropy_core.report.markdown import markdown_rows

MOST_ROWS, MOST_TOKENS = 16, 8


def sentence(rows: Sequence[Row]) -> str:
    """Say what all steps on the rollout of the last checkpoint do to the entropy.

    Args:
        rows: of `phase.parquet`, of one normalisation.

    Returns:
        A sentence without markup; empty without rows.
    """
    of_run = _as_it_is(rows)
    if not of_run:
        return ""
    row = of_run[-1]
    of_all = f"At {row['checkpoint']} the {row['phase_step']} steps on one rollout"
    if row["verdict"] == "weights-unreliable":
        return f"{of_all} go too far for the importance weights: what they do to the entropy cannot be told."
    change = f"{row['delta_h']:+.2g} {_interval(row, 'delta_h')}"
    clipped = "" if row["clip_low"] is None else f"; the last clips {_clipped(row):.2%} of its tokens"
    return f"{of_all} change the entropy by {change}{clipped}."


def section(rows: Sequence[Row], clipped: Sequence[Row]) -> list[str]:
    """Return the section on the phase.

    Args:
        rows: of `phase.parquet`, of one normalisation.
        clipped: rows of `clipped.parquet`.

    Returns:
        Lines of markdown; none if no phase was followed.
    """
    if not rows:
        return []
    body = []
    for name, group in by_checkpoint(_as_it_is(rows)).items():
        shown = _spread(group)
        body += [
            (
                name,
                f"{row['phase_step']} ({row['epoch']}.{row['minibatch']})",
                "–" if row["delta_h"] is None else f"{row['delta_h']:+.3g} {_interval(row, 'delta_h')}",
                "–" if row["of_step"] is None else f"{row['of_step']:+.2g}",
                "–" if row["delta_j"] is None else f"{row['delta_j']:+.3g} {_interval(row, 'delta_j')}",
                f"{row['ess_fraction']:.2f}",
                " / ".join("–" if row[side] is None else f"{row[side]:.2%}" for side in ("clip_low", "clip_high")),
                f"{row['approx_kl']:.2g}",
                f"{row['gradient_norm']:.3g}",
                row["verdict"],
            )
            for row in shown
        ]
    head = (
        *("checkpoint", "step (epoch.minibatch)", "ΔH since the rollout, this update", "ΔH of the step"),
        *("ΔJ, this update", "ESS/N", "clipped low / high", "KL(old, now)", "gradient norm", "verdict"),
    )
    lines = [
        *markdown_rows(head, body),
        "",
        "The trainer takes these steps on one rollout, which is U: each on a minibatch of it, with the moments of the "
        "step before, and the importance ratios to the policy of the rollout clipped. ΔH and ΔJ are measured on the "
        "same E by weights from that policy, so that ESS/N falls from step to step; below 0.5 they are not trusted. "
        "The brackets have the randomness of E alone.",
    ]
    return [*lines, *_changed(rows), *_tokens(_as_it_is(clipped))]


def _as_it_is(rows: Sequence[Row]) -> list[Row]:
    """Those of the run without any intervention, which are the first of a checkpoint."""
    return [row for row in rows if row["intervention"] == rows[0]["intervention"]]


def _changed(rows: Sequence[Row]) -> list[str]:
    """What the interventions make of the whole phase, by checkpoint, the largest difference first."""
    last = max(row["phase_step"] for row in rows)
    tried = [row for row in rows if row["phase_step"] == last and row["intervention"] != rows[0]["intervention"]]
    if not tried:
        return []
    tried.sort(key=lambda row: (row["step"], row["checkpoint"], -(row["difference"] or 0.0)))
    body = [
        (
            row["checkpoint"],
            row["intervention"],
            "–" if row["delta_h"] is None else f"{row['delta_h']:+.3g}",
            "–" if row["difference"] is None else f"{row['difference']:+.3g} {_interval(row, 'difference')}",
            "–" if row["delta_j"] is None else f"{row['delta_j']:+.3g} {_interval(row, 'delta_j')}",
            f"{row['ess_fraction']:.2f}",
            " / ".join("–" if row[side] is None else f"{row[side]:.2%}" for side in ("clip_low", "clip_high")),
        )
        for row in tried
    ]
    head = ("checkpoint", "under", "ΔH after the last step", "minus that of the run, this update", "ΔJ, this update")
    table = markdown_rows((*head, "ESS/N", "clipped low / high"), body, text_columns=2)
    return ["", f"What would change it, after all {last} steps, on the same rollout and the same E:", "", *table]


def _tokens(clipped: Sequence[Row]) -> list[str]:
    """The tokens that are clipped most often."""
    if not clipped:
        return []
    by_text: dict[str, list[Row]] = {}
    for row in clipped:
        by_text.setdefault(row["text"], []).append(row)
    most = sorted(by_text.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_TOKENS]
    body = []
    for text, group in most:
        sides = Counter(row["side"] for row in group)
        body.append(
            (
                f"`{_visible(text)}`",
                *(str(sides[side]) for side in ("low", "high", "dual")),
                f"{_mean(group, 'ratio'):.3g}",
                f"{_mean(group, 'old_logprob'):.3g}",
                f"{_mean(group, 'old_entropy'):.3g}",
            )
        )
    head = ("token", "low, A < 0", "high, A > 0", "dual, A < 0", "mean ratio", "mean log π_old", "mean entropy")
    return ["", f"The tokens that are clipped most often, of {len(clipped)}:", "", *markdown_rows(head, body)]


def _visible(text: str) -> str:
    """A token within a line of code in a table: what cannot be seen there, or would end it, is replaced."""
    seen = "".join(character if character.isprintable() else "·" for character in text)
    return seen.replace(" ", "␣").replace("`", "'").replace("|", "¦") or "·"


def _spread(rows: Sequence[Row]) -> list[Row]:
    """The first and the last step, and as many between them as a page has room for."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    places = {round(i * (len(rows) - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
    return [rows[place] for place in sorted(places)]


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(sum(row[name] for row in rows)) / len(rows)


def _clipped(row: Row) -> float:
    return float(sum(row[side] for side in ("clip_low", "clip_high", "clip_dual")))


def _interval(row: Row, name: str) -> str:
    return f"[{row[f'{name}_low']:+.2g}, {row[f'{name}_high']:+.2g}]"
