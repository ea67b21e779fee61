"""What people look at: figures and a page of a sweep. The only importer of matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_core.numerics.uncertainty import normal_quantile

Row = Mapping[str, Any]

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "entropy-probe",  # element ids would be random otherwise, and the file's digest with them
}
COLUMNS = {
    "checkpoint": "checkpoint",
    "eta_over_lr": "η / lr",
    "estimator": "estimator",
    "H": "H",
    "delta_h1": "δH₁",
    "se_given_u": "SE given U",
    "se_over_u": "SE over U",
    "ci_low": "CI low",
    "ci_high": "CI high",
    "delta_h": "ΔH",
    "delta_h_se": "SE ΔH",
    "paired_difference": "ΔH − δH₁",
    "paired_difference_se": "paired SE",
    "ess_fraction": "ESS/N",
    "verdict": "verdict",
}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """The three figures of a sweep, of its first normalisation.

    Args:
        rows: of the result table.

    Returns:
        Figures by name: prediction against measurement, ΔH against η, entropy and δH₁ along the training.
    """
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    unit = "nats per token" if normalization == "per_token" else "nats per sequence"
    with matplotlib.rc_context(STYLE):
        return {
            "prediction": _draw(_prediction, shown, unit),
            "eta_sweep": _draw(_eta_sweep, shown, unit),
            "training": _draw(_training, shown, unit),
        }


def save_figure(figure: Figure, png: Path, svg: Path) -> None:
    """Write a figure in both formats, without dates, so that equal figures are equal files."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=144, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})


def markdown(name: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The page of a sweep.

    Args:
        name: of the sweep.
        rows: of the result table.
        notes: what was assumed.

    Returns:
        Markdown; figures are linked by file name.
    """
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    normalization = rows[0]["normalization"]
    shown = [row for row in rows if row["normalization"] == normalization]
    first = shown[0]
    lines = [
        f"# {name}: what one optimizer step does to the entropy",
        "",
        f"{len(checkpoints)} checkpoint(s), E of {first['n_sequences']} sequences, U of {first['n_prompts_u']} "
        f"prompts. Entropies in nats ({normalization}); intervals at {first['confidence_level']:.0%}.",
        "",
        *_headlines(shown),
        "",
        "![predicted against measured entropy change](prediction.png)",
        "",
        "![entropy change against step size](eta_sweep.png)",
        "",
        "![entropy and its predicted change along the training](training.png)",
        "",
        "## Results",
        "",
        markdown_table(shown),
        "",
        "δH₁ is the first-order prediction η·⟨∇H, v⟩, ΔH the change measured by importance sampling. *SE given U* "
        "holds the update fixed and lets E vary, *SE over U* the reverse; the interval covers both. δH₁ and ΔH come "
        "from one E batch and share its noise: their agreement shows that the step is linear, not that δH₁ is "
        "accurate. The interval says how accurate it is.",
        "",
        "## Checks",
        "",
        *_checks(shown, checkpoints),
    ]
    if notes:
        lines += ["", "## Taken to be so", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """The main columns of result rows as a markdown table, rounded."""
    head = "| " + " | ".join(COLUMNS.values()) + " |"
    rule = "|" + "|".join("---" if name in {"checkpoint", "estimator", "verdict"} else "---:" for name in COLUMNS) + "|"
    body = ["| " + " | ".join(format_value(name, row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join([head, rule, *body])


def format_value(name: str, value: Any) -> str:
    """A cell of the result table, rounded to what a reader can use."""
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


def _headlines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in _first_of_each(_at_learning_rate(rows)):
        measured = "not measurable" if row["delta_h"] is None else f"{row['delta_h']:+.3g} ± {row['delta_h_se']:.2g}"
        lines.append(
            f"- **{row['checkpoint']}**: H = {row['H']:.4f}; a step of {row['eta_over_lr']:g} × lr changes it by "
            f"δH₁ = {row['delta_h1']:+.3g} [{row['ci_low']:+.3g}, {row['ci_high']:+.3g}], measured "
            f"{measured} ({row['verdict']})"
        )
    return lines


def _checks(rows: Sequence[Row], checkpoints: Sequence[str]) -> list[str]:
    lines = [
        "| checkpoint | ⟨∇H, v⟩ against forward mode | mean score z | largest noise floor | kurtosis "
        "| largest influence | cut responses | clip factor | equal rewards |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for checkpoint in checkpoints:
        group = [row for row in rows if row["checkpoint"] == checkpoint]
        row, noise = group[0], max(row["noise_floor"] for row in group)
        lines.append(
            f"| {checkpoint} | {row['gradient_check']:.1e} | {row['mean_score_z']:+.2f} | {noise:.1e} | "
            f"{row['excess_kurtosis']:.1f} | {row['largest_influence']:.2%} | {row['truncated_fraction']:.1%} | "
            f"{row['clip_factor']:.3f} | {row['equal_reward_fraction']:.0%} |"
        )
    return lines


def _draw(draw: Callable[[Figure, Sequence[Row], str], None], rows: Sequence[Row], unit: str) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure, rows, unit)
    return figure


def _prediction(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    axes = figure.subplots()
    quantile = normal_quantile(rows[0]["confidence_level"])
    estimator = rows[0]["estimator"]
    shown = [row for row in _at_learning_rate(rows) if row["delta_h"] is not None and row["estimator"] == estimator]
    for row in shown:
        axes.errorbar(
            row["delta_h1"],
            row["delta_h"],
            xerr=[[row["delta_h1"] - row["ci_low"]], [row["ci_high"] - row["delta_h1"]]],
            yerr=quantile * row["delta_h_se"],
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=row["checkpoint"],
        )
    ends = [value for row in shown for value in (row["ci_low"], row["ci_high"], row["delta_h"])] or [0.0]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="ΔH = δH₁")
    axes.set(
        xlabel=f"predicted δH₁ [{unit}], interval over E and U",
        ylabel=f"measured ΔH [{unit}], given U",
        title=f"Predicted and measured entropy change, η = {shown[0]['eta_over_lr']:g} × lr" if shown else "",
    )
    axes.legend()


def _eta_sweep(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    groups = _by_checkpoint([row for row in rows if row["delta_h"] is not None])
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure.set_size_inches(6.4, 1.0 + 2.6 * lines)
    panels: list[Axes] = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    quantile = normal_quantile(rows[0]["confidence_level"])
    for axes, (checkpoint, group) in zip(panels, groups.items(), strict=False):
        line = sorted(group, key=lambda row: row["eta"])
        x = [row["eta_over_lr"] for row in line]
        axes.plot(x, [row["delta_h1"] for row in line], color="black", linewidth=0.8, label="δH₁")
        low, high = [row["ci_low"] for row in line], [row["ci_high"] for row in line]
        axes.fill_between(x, low, high, color="black", alpha=0.12, linewidth=0)
        for estimator in dict.fromkeys(row["estimator"] for row in group):
            part = [row for row in line if row["estimator"] == estimator]
            axes.errorbar(
                [row["eta_over_lr"] for row in part],
                [row["delta_h"] for row in part],
                yerr=[quantile * row["delta_h_se"] for row in part],
                fmt="o" if estimator == "per_decision" else "x",
                markersize=4,
                capsize=2,
                linewidth=1,
                label=f"ΔH {estimator}",
            )
        axes.set_title(checkpoint, fontsize=9)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.supxlabel("η / lr", fontsize=9)
    figure.supylabel(f"entropy change [{unit}]", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def _training(figure: Figure, rows: Sequence[Row], unit: str) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    at_lr = _first_of_each(_at_learning_rate(rows))
    first = _first_of_each(rows)
    quantile = normal_quantile(rows[0]["confidence_level"])
    above.errorbar(
        [row["step"] for row in first],
        [row["H"] for row in first],
        yerr=[quantile * row["H_se"] for row in first],
        fmt="o-",
        markersize=4,
        capsize=2,
        linewidth=1,
    )
    above.set(ylabel=f"H [{unit}]", title="Entropy, and what the next step does to it")
    if at_lr:
        below.errorbar(
            [row["step"] for row in at_lr],
            [row["delta_h1"] for row in at_lr],
            yerr=[
                [row["delta_h1"] - row["ci_low"] for row in at_lr],
                [row["ci_high"] - row["delta_h1"] for row in at_lr],
            ],
            fmt="o-",
            markersize=4,
            capsize=2,
            linewidth=1,
        )
        below.set(ylabel=f"δH₁ at {at_lr[0]['eta_over_lr']:g} × lr")
    below.axhline(0, color="black", linewidth=0.8)
    below.set(xlabel="training step")


def _at_learning_rate(rows: Sequence[Row]) -> list[Row]:
    """The rows of each checkpoint whose step size is closest to the learning rate; 0 is none."""
    chosen = []
    for group in _by_checkpoint([row for row in rows if row["eta"] != 0]).values():
        closest = min((row["eta"] for row in group), key=lambda eta: abs(eta / group[0]["learning_rate"] - 1))
        chosen += [row for row in group if row["eta"] == closest]
    return chosen


def _by_checkpoint(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["checkpoint"], []).append(row)
    return groups


def _first_of_each(rows: Sequence[Row]) -> list[Row]:
    return [group[0] for group in _by_checkpoint(rows).values()]
