"""report: the result tables of a sweep, its figures, and its report page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entropy_core.estimates.phase_table import CLIPPED, PHASE
from entropy_core.estimates.post_mortem import POST_MORTEM
from entropy_core.estimates.price_table import PRICE
from entropy_core.estimates.rehearsal_table import REHEARSAL
from entropy_core.estimates.selection import Row, by_run_directory, unit_of
from entropy_core.estimates.tables import INTERVENTIONS, RESULTS, TABLES, of_checkpoints, to_table
from entropy_core.report import contents, headline, html
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
            columns, `agreement.parquet`, `price.parquet`, `interventions.parquet`, `phase.parquet`, `clipped.parquet`,
            `rehearsal.parquet` and `post_mortem.parquet` if they were asked for, `report.md`, the same page as
            `report.html`, the figures as PNG and SVG, and the main columns of the results as CSV and JSON.
        execution: unused.
        name: name of the sweep.
        checkpoints: one mapping per checkpoint: `checkpoint` (name), `step`, `estimates` (artifact of variance),
            `attribution` (artifact of first-order-u), `interventions`, `price`, `phase`, `rehearsal` and `post_mortem`
            (artifacts of these stages, or None).
        agreement: artifact of agreement, whose table is copied.
        settings: settings of the training, as mappings of `key`, `value` and `source`.
        warnings: warnings at the top of the report, one sentence each.
        notes: assumptions, one sentence each.

    Returns:
        Summary: numbers of rows and checkpoints.
    """
    # here, so that only this stage loads the plotting library
    from entropy_core.report import comparison_figure, figures, frontier, rehearsal_figure

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
    bought: dict[str, Any] = {}
    for entry in checkpoints:
        of_tokens = entry["price"].summary["bought"] if entry["price"] else {}
        if of_tokens:
            bought[entry["checkpoint"]] = of_tokens[rows[0]["normalization"]]
    if priced := [entry["price"] for entry in checkpoints if entry["price"]]:
        out.table(to_table(prices, of_checkpoints(PRICE)), "price.parquet")
        without_reward = sum(artifact.summary["without_reward"] for artifact in priced)
    along, clipped = (_gathered(checkpoints, table, "phase") for table in ("phase", "clipped"))
    if any(entry["phase"] for entry in checkpoints):
        out.table(to_table(along, of_checkpoints(PHASE)), "phase.parquet")
        out.table(to_table(clipped, of_checkpoints(CLIPPED)), "clipped.parquet")
    rehearsed = _gathered(checkpoints, "rehearsal", "rehearsal")
    if rehearsed:
        out.table(to_table(rehearsed, of_checkpoints(REHEARSAL)), "rehearsal.parquet")
        shown = [row for row in rehearsed if row["normalization"] == rows[0]["normalization"]]
        drawn["rehearsal"] = rehearsal_figure.rehearsal_figure(shown)
    dissected = _gathered(checkpoints, "post_mortem", "post_mortem")
    if dissected:
        out.table(to_table(dissected, of_checkpoints(POST_MORTEM)), "post_mortem.parquet")
    samplers = {
        entry["checkpoint"]: entry["post_mortem"].summary["sampler"] for entry in checkpoints if entry["post_mortem"]
    }
    for figure_name, figure in drawn.items():
        figures.save_figure(figure, out.path(f"{figure_name}.png"), out.path(f"{figure_name}.svg"))
    page = pages.markdown(
        name,
        rows,
        others,
        notes,
        contents.OfTraining(settings, warnings, compared.to_pylist()),
        contents.Tried(changes, skipped),
        contents.Prices(prices, without_reward, bought),
        contents.OnRollout(along, clipped),
        contents.StepTaken(dissected, samplers),
        rehearsed,
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
