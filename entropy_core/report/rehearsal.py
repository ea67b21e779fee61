"""The section of the report on rehearsals: real steps from a checkpoint, as the run is and under interventions."""

from collections.abc import Sequence

from entropy_core.estimates.selection import Row, by_checkpoint
from entropy_core.report.markdown import markdown_rows


def sentence(rows: Sequence[Row]) -> str:
    """Say where the rehearsed steps lead, and what surely keeps most entropy.

    Args:
        rows: of `rehearsal.parquet`, of one normalisation.

    Returns:
        A sentence without markup; empty if nothing was rehearsed.
    """
    together = [row for row in rows if row["replicate"] is None]
    if not together:
        return ""
    name, group = list(by_checkpoint(together).items())[-1]
    last = max(row["rehearsal_step"] for row in group)
    run, *others = [row for row in group if row["rehearsal_step"] == last]
    seeds = f"from {run['replicates']} seeds" if run["replicates"] > 1 else "from one seed"
    change = f"from {group[0]['H']:.4f} to {run['H']:.4f} [{run['H_low']:.4f}, {run['H_high']:.4f}]"
    said = f"{last} real steps from {name}, rehearsed {seeds}, take the entropy {change}"
    if run["floor"] is not None:
        said += f"; below {run['floor']:g} at step {_reached(run)}" if run["floor_low"] is not None else ""
    kept = [row for row in others if row["difference_low"] > 0]
    if kept:
        best = max(kept, key=lambda row: float(row["difference"]))
        said += f"; under {best['intervention']} it ends {_difference(best, 'difference')} higher"
    elif others:
        said += f"; under none of {len(others)} interventions does it surely end higher"
    return f"{said}."


def section(rows: Sequence[Row]) -> list[str]:
    """Return the section on rehearsals.

    Args:
        rows: of `rehearsal.parquet`, of one normalisation.

    Returns:
        Lines of markdown; none if nothing was rehearsed.
    """
    lines: list[str] = []
    for name, group in by_checkpoint([row for row in rows if row["replicate"] is None]).items():
        last = max(row["rehearsal_step"] for row in group)
        start = next(row for row in group if row["rehearsal_step"] == 0)
        ended = [row for row in group if row["rehearsal_step"] == last]
        many = start["replicates"] > 1
        of = f"each from {start['replicates']} seeds" if many else "from one seed"
        lines += [
            f"{last} real steps from {name}, {of}, which begin at H = {start['H']:.4f}:",
            "",
            *markdown_rows(_head(last, ended[0]), [_cells(row) for row in ended]),
            "",
        ]
    if not lines:
        return []
    return [
        "![entropy and expected reward along the rehearsed steps](rehearsal.png)",
        "",
        *lines,
        "Every step is on fresh responses of the policy as it is then, rewarded anew, with the moments of the step "
        "before, at the learning rate of the trainer's schedule, or of the first step where a warning at the top says "
        "that it is not known; H, J and length are those of an E that the policy draws itself. "
        "From one seed all interventions have the same prompts and the same random numbers, so that the differences "
        "are paired. Intervals are between seeds, or over E where there is only one; the band is for one more run "
        "from another seed. Nothing is adjusted for the number of interventions.",
    ]


def _head(last: int, row: Row) -> tuple[str, ...]:
    floor = () if row["floor"] is None else (f"H below {row['floor']:g} at step",)
    return (
        *("under", f"H after {last} steps", "band of a run", "minus that of the run", "J", "minus that of the run"),
        *("length", *floor),
    )


def _cells(row: Row) -> tuple[str, ...]:
    floor = () if row["floor"] is None else (_reached(row),)
    band = "–" if row["H_run_low"] is None else f"{row['H_run_low']:.4f} to {row['H_run_high']:.4f}"
    return (
        row["intervention"],
        f"{row['H']:.4f} [{row['H_low']:.4f}, {row['H_high']:.4f}]",
        band,
        _difference(row, "difference"),
        "–" if row["J"] is None else f"{row['J']:.3f} [{row['J_low']:.3f}, {row['J_high']:.3f}]",
        _difference(row, "difference_j"),
        f"{row['length']:.1f}",
        *floor,
    )


def _difference(row: Row, name: str) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:+.2g} [{row[f'{name}_low']:+.2g}, {row[f'{name}_high']:+.2g}]"


def _reached(row: Row) -> str:
    """When the floor is reached, and between which steps by the ends of the band."""
    step, low, high = (row[name] for name in ("floor_step", "floor_low", "floor_high"))
    if low is None:
        return "not reached"
    ends = f"[{low}, {'later' if high is None else high}]"
    return f"{'later' if step is None else step} {ends}"
