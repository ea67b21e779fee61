"""The sections of a sweep's page that come from the tables beside the results."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from entropy_core.estimates.tables import Row, at_learning_rate
from entropy_core.numerics.predictors import agreement

Tables = Mapping[str, Sequence[Row]]


def markdown_rows(head: Sequence[str], body: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A markdown table: the first columns to the left, the others to the right."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def settings_table(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of the training, and where each is from."""
    body = []
    for setting in settings:
        value = json.dumps(setting["value"], ensure_ascii=False).replace("|", "\\|")
        body.append((f"`{setting['key']}`", f"`{value}`", str(setting["source"]).replace("|", "\\|")))
    return markdown_rows(("setting", "value", "where it is from"), body, 3)


def linearity(tables: Tables) -> list[str]:
    """How ΔH depends on the step size."""
    if not tables["linearity"]:
        return []
    head = ("checkpoint", "estimator", "∂_vH", "ΔH/η as η → 0", "difference", "coefficient of η")
    columns = ("derivative", "intercept", "difference", "curvature")
    body = [(row["checkpoint"], row["estimator"], *_with_errors(row, columns)) for row in tables["linearity"]]
    lines = [
        *markdown_rows(head, body, 2),
        "",
        "Weighted fit of ΔH/η against η, per learning-rate unit, with the covariance of the E batch that all step "
        "sizes share: its intercept is to be the derivative of the same estimator. The noise of the batch cancels in "
        "their difference; what is left are the orders that the fit leaves out, to be held against the error of ∂_vH.",
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
            "Pairs ±η: even orders cancel in the odd part, odd ones in the even.",
        ]
    return lines


def _with_errors(row: Row, columns: Sequence[str]) -> list[str]:
    return [f"{row[column]:+.4g} ± {row[f'{column}_se']:.2g}" for column in columns]


def replicates(tables: Tables) -> list[str]:
    """The accuracy of δH₁ itself."""
    first = {row["checkpoint"]: row for row in reversed(tables["replicates"])}
    body = [
        (
            checkpoint,
            f"{row['replicates']}",
            f"{row['delta_h1']:+.4g} ± {row['se_given_u']:.2g}",
            f"{row['mean']:+.4g} ± {row['mean_se']:.2g}",
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
        "δH₁ at the learning rate on independent E batches, with the update held fixed; p is that of their differences "
        "given their standard errors.",
    ]


def predictors(tables: Tables) -> list[str]:
    """δH₁ and the predictors of the literature against ΔH, over the checkpoints."""
    rows = at_learning_rate([{**row, "learning_rate": row["eta"] / row["eta_over_lr"]} for row in tables["predictors"]])
    rows = [row for row in rows if row["delta_h"] is not None]
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    body = []
    for name in names:
        mine = [row for row in rows if row["predictor"] == name]
        predicted, measured = (
            torch.tensor([row[column] for row in mine], dtype=torch.float64) for column in ("predicted", "delta_h")
        )
        found = agreement(predicted, measured)
        numbers = (found.slope, found.r_squared, found.sign_accuracy)
        cells = ("–" if number is None else f"{number:.3g}" for number in numbers)
        body.append((f"`{name}`", *cells, f"{found.points}"))
    if not body:
        return []
    return [
        *markdown_rows(("predictor", "slope", "R²", "same sign", "checkpoints"), body),
        "",
        "Measured ΔH on predicted, a point per checkpoint at the step size closest to the learning rate. "
        "`token_covariance` is −Cov(log π, A) and `weighted_token_covariance` −Cov(log π, πA) over the tokens of U "
        "(arXiv:2505.22617), `discriminator` −mean A(S* − E[S*]) (arXiv:2602.03392). They leave out the optimizer, the "
        "parameters that states share, and what the step does to later states and to the length; so their scale is "
        "arbitrary, and their slope only says what it would have to be.",
    ]


SECTIONS: dict[str, Callable[[Tables], list[str]]] = {
    "Linearity": linearity,
    "Accuracy of δH₁": replicates,
    "Predictors from the literature": predictors,
}
