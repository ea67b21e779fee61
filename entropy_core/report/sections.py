"""Report sections for the diagnostic tables: linearity, replicates of E, predictors from the literature."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.selection import Row, at_learning_rate
from entropy_core.numerics.predictors import agreement, points_needed, rank_correlation, slope_standard_error
from entropy_core.report.markdown import markdown_rows

Tables = Mapping[str, Sequence[Row]]


def settings_table(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of the training, and where each is from."""
    body = []
    for setting in settings:
        value = json.dumps(setting["value"], ensure_ascii=False).replace("|", "\\|")
        body.append((f"`{setting['key']}`", f"`{value}`", str(setting["source"]).replace("|", "\\|")))
    return markdown_rows(("setting", "value", "where it is from"), body, 3)


def linearity(tables: Tables) -> list[str]:
    """Return the section on how ΔH depends on the step size η."""
    if not tables["linearity"]:
        return []
    head = ("checkpoint", "estimator", "∂_vH", "ΔH/η as η → 0", "difference", "coefficient of η")
    columns = ("derivative", "intercept", "difference", "curvature")
    body = [(row["checkpoint"], row["estimator"], *_with_errors(row, columns)) for row in tables["linearity"]]
    lines = [
        *markdown_rows(head, body, 2),
        "",
        "Weighted fit of ΔH/η against η, in nats per unit of η. The weights account for the E batch that all step "
        "sizes share. The intercept should equal ∂_vH, the derivative of the same estimator. Batch noise cancels in "
        "their difference, which shows the orders missing from the fit; compare it with the standard error of ∂_vH.",
    ]
    if tables["eta_pairs"]:
        head = ("checkpoint", "estimator", "η / lr", "odd part", "odd part − η∂_vH", "even part")
        body = [
            (
                row["checkpoint"],
                row["estimator"],
                f"{row['eta_over_lr']:g}",
                *_with_errors(row, ("odd", "odd_remainder", "even")),
            )
            for row in tables["eta_pairs"]
        ]
        lines += [
            "",
            *markdown_rows(head, body, 2),
            "",
            "Pairs ±η: even orders of η cancel in the odd part, and odd orders in the even part.",
        ]
    return lines


def _with_errors(row: Row, columns: Sequence[str]) -> list[str]:
    return [f"{row[column]:+.4g} (SE {row[f'{column}_se']:.2g})" for column in columns]


def replicates(tables: Tables) -> list[str]:
    """Return the section that compares δH₁ between independent E batches."""
    first = {row["checkpoint"]: row for row in reversed(tables["replicates"])}
    body = [
        (
            checkpoint,
            f"{row['replicates']}",
            f"{row['delta_h1']:+.4g} (SE {row['se_given_u']:.2g})",
            f"{row['mean']:+.4g} (SE {row['mean_se']:.2g})",
            f"{row['p_value']:.2g}",
        )
        for checkpoint, row in reversed(first.items())
    ]
    if not body:
        return []
    head = ("checkpoint", "E batches", "δH₁ on the first", "mean over all", "p")
    return [
        *markdown_rows(head, body),
        "",
        "δH₁ at the learning rate on independent E batches, with the update held fixed. p tests whether the batches "
        "differ by more than their standard errors explain.",
    ]


def predictors(tables: Tables) -> list[str]:
    """Return the section that compares δH₁ and predictors from the literature with ΔH, over the checkpoints."""
    rows = at_learning_rate([{**row, "learning_rate": row["eta"] / row["eta_over_lr"]} for row in tables["predictors"]])
    rows = [row for row in rows if row["delta_h"] is not None]
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    body = []
    for name in names:
        points = [row for row in rows if row["predictor"] == name and row["predicted"] is not None]
        predicted, measured = (
            torch.tensor([row[column] for row in points], dtype=torch.float64) for column in ("predicted", "delta_h")
        )
        result, ranks = agreement(predicted, measured), rank_correlation(predicted, measured)
        needed = None if result.r_squared is None else points_needed(result.r_squared)
        cells = (
            "–"
            if result.slope is None
            else f"{result.slope:+.3g} {_slope_interval(predicted, measured, result.slope)}",
            "–" if result.r_squared is None else f"{result.r_squared:.3g}",
            "–" if ranks is None else f"{ranks.tau:+.2f} (p = {ranks.p_value:.2g})",
            "–" if result.sign_accuracy is None else f"{result.sign_accuracy:.0%}",
            f"{result.points}",
            "–" if needed is None else f"{needed}",
        )
        body.append((f"`{name}`", *cells))
    if not body:
        return []
    return [
        *markdown_rows(("predictor", "slope [95 %]", "R²", "Kendall's τ", "same sign", "checkpoints", "needs"), body),
        "",
        "Regression of the measured on the predicted ΔH, with one point per checkpoint at the step size closest to the "
        "learning rate. A predictor is right if its slope is positive; the bracket is the t interval of the slope, and "
        "p is that of no relation, exact. R² of a few points is large by chance: without any relation it is on average "
        "1/(checkpoints − 1). *Needs* is how many checkpoints it takes to tell such a correlation from none, at "
        "5 % and in 80 % of all runs; with fewer, the row says nothing. With fewer than five no ranking does.",
        "",
        "`delta_h1` and `delta_h12` share U, the step and E with the ΔH they are compared with, so that their noise "
        "agrees, too. "
        + (
            "`delta_h1_other_e` is δH₁ on the other E batches, which shares only U and the step: compare by this row."
            if "delta_h1_other_e" in names
            else "`batch_config.E_replicates: 2` adds δH₁ on another E batch, by which to compare."
        ),
        "",
        "`token_covariance` is −Cov(log π, A) and `weighted_token_covariance` −Cov(log π, πA) over the tokens of U "
        "(arXiv:2505.22617); `discriminator` is −mean A(S* − E[S*]) (arXiv:2602.03392). These three ignore the "
        "optimizer, parameter sharing between states, and the effect of the step on later states and on the response "
        "length. Their scale is therefore arbitrary, and their slope only tells which factor would fit.",
        "",
        "Checkpoints share the seeds of E and U, and their errors are correlated. What all of them share goes into the "
        "intercept, and not into the slope.",
    ]


def _slope_interval(predicted: torch.Tensor, measured: torch.Tensor, slope: float) -> str:
    error = slope_standard_error(predicted, measured)
    if error is None:
        return ""
    reach = t_quantile(0.975, len(predicted) - 2) * error
    return f"[{slope - reach:+.3g}, {slope + reach:+.3g}]"


SECTIONS: dict[str, Callable[[Tables], list[str]]] = {
    "Linearity": linearity,
    "Accuracy of δH₁": replicates,
    "Predictors from the literature": predictors,
}
