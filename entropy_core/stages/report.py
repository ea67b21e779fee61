"""report: the result tables of a sweep, its figures, and its report page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entropy_core.estimates.price_table import PRICE
from entropy_core.estimates.selection import Row, by_run_directory, unit_of
from entropy_core.estimates.tables import INTERVENTIONS, RESULTS, TABLES, of_checkpoints, to_table
from entropy_core.report import headline, html
from entropy_core.report import page as pages

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Agreement, ReportedCheckpoint


def report(
    out: "Writer",
    execution: "Execution",
    *,
    name: str,
    checkpoints: "Sequence[ReportedCheckpoint]",
    agreement: "Agreement",
    settings: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Collect the estimates of all checkpoints, and write tables, figures and report.

    Args:
        out: writer of `results.parquet` (schema `tables.RESULTS`), the tables of `tables.TABLES` with checkpoint
            columns, `agreement.parquet`, `price.parquet` and `interventions.parquet` if they were asked for,
            `report.md`, the same page as `report.html`, the figures as PNG and SVG, and the main columns of the results
            as CSV and JSON.
        execution: unused.
        name: name of the sweep.
        checkpoints: one mapping per checkpoint: `checkpoint` (name), `step`, `estimates` (artifact of variance),
            `attribution` (artifact of first-order-u), `interventions` and `price` (artifacts of these stages, or None).
        agreement: artifact of agreement, whose table is copied.
        settings: settings of the training, as mappings of `key`, `value` and `source`.
        warnings: warnings at the top of the report, one sentence each.
        notes: assumptions, one sentence each.

    Returns:
        Summary: numbers of rows and checkpoints.
    """
    # here, so that only this stage loads the plotting library
    from entropy_core.report import comparison_figure, figures, frontier

    rows = _gathered(checkpoints, "estimates")
    out.table(to_table(rows, RESULTS), "results.parquet")
    out.path("headline.csv").write_text(headline.as_csv(rows), encoding="utf-8")
    out.path("headline.json").write_text(headline.as_json(rows), encoding="utf-8")
    others = {table: _gathered(checkpoints, table) for table in TABLES}
    for table, schema in TABLES.items():
        out.table(to_table(others[table], of_checkpoints(schema)), f"{table}.parquet")
    compared = agreement.table("agreement.parquet")
    out.table(compared, "agreement.parquet")
    last = checkpoints[-1]
    tokens, sequences = (last["attribution"].table(f"{table}.parquet").to_pylist() for table in ("tokens", "sequences"))
    drawn = figures.figures(rows, compared.to_pylist())
    drawn["tokens"] = figures.token_figure(tokens, sequences, rows, last["checkpoint"])
    if len(directories := by_run_directory(rows)) > 1:
        drawn["training"] = comparison_figure.comparison_figure(directories)
    tried = [entry["interventions"] for entry in checkpoints if entry["interventions"]]
    changes = [row for artifact in tried for row in artifact.table("interventions.parquet").to_pylist()]
    skipped = {
        entry["checkpoint"]: entry["interventions"].summary["skipped"]
        for entry in checkpoints
        if entry["interventions"]
    }
    if tried:
        out.table(to_table(changes, INTERVENTIONS), "interventions.parquet")
        shown = [row for row in changes if row["normalization"] == rows[0]["normalization"]]
        drawn["interventions"] = figures.intervention_figure(shown)
        if frontier.with_rewards(shown):
            drawn["frontier"] = frontier.frontier_figure(shown)
    prices, without_reward = _gathered(checkpoints, "price", "price"), 0
    if priced := [entry["price"] for entry in checkpoints if entry["price"]]:
        out.table(to_table(prices, of_checkpoints(PRICE)), "price.parquet")
        without_reward = sum(artifact.summary["without_reward"] for artifact in priced)
    for figure_name, figure in drawn.items():
        figures.save_figure(figure, out.path(f"{figure_name}.png"), out.path(f"{figure_name}.svg"))
    page = pages.markdown(
        name,
        rows,
        others,
        notes,
        pages.OfTraining(settings, warnings, compared.to_pylist()),
        pages.Tried(changes, skipped),
        pages.Prices(prices, without_reward),
    )
    out.path("report.md").write_text(page, encoding="utf-8")
    share, unit = f"share_{rows[0]['normalization']}", unit_of(rows[0]["normalization"])
    in_text = html.responses(last["checkpoint"], tokens, sequences, share, unit)
    inlined = {figure_name: out.path(f"{figure_name}.svg").read_bytes() for figure_name in drawn}
    out.path("report.html").write_text(html.html(name, page, inlined, in_text), encoding="utf-8")
    return {"rows": len(rows), "checkpoints": len(checkpoints)}


def _gathered(checkpoints: "Sequence[Mapping[str, Any]]", table: str, of: str = "estimates") -> list[Row]:
    return [
        {"checkpoint": entry["checkpoint"], "step": entry["step"]} | row
        for entry in checkpoints
        if entry[of]
        for row in entry[of].table(f"{table}.parquet").to_pylist()
    ]
