"""What a sweep would compute, before it is run: for `entropy-probe plan`, and in Prefect's UI."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_core.config.read import load_config
from entropy_core.pipeline.plan import Cost, Step, plan, typical_costs
from entropy_core.pipeline.preflight import preflight
from entropy_core.store.store import Store
from flows.results import aligned, duration, size
from flows.stage_lines import PART, whole

_MOST = 2  # reasons in one cell


def plan_table(steps: Sequence[Step], costs: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """Lay a plan out, with a row for all shards that a stage has of one thing.

    Args:
        steps: of `pipeline.plan.plan`.
        costs: of `pipeline.plan.typical_costs`.

    Returns:
        Rows with `stage`; `of`, such as "checkpoint-20"; `cached` and `would run`, numbers; `parts`, the shards that
        would run; `time` and `disk` of these, empty where the stage was never run before; `why`.
    """
    grouped: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        grouped.setdefault((step.stage, whole(step.label)), []).append(step)
    rows = []
    for (stage, of), members in grouped.items():
        to_run = [step for step in members if not step.cached]
        cost = costs.get(stage) if to_run else None
        reasons = list(dict.fromkeys(reason for step in to_run for reason in step.reasons))
        more = [f"and {len(reasons) - _MOST} more"] if len(reasons) > _MOST else []
        rows.append(
            {
                "stage": stage,
                "of": of,
                "cached": len(members) - len(to_run),
                "would run": len(to_run),
                "parts": _parts(to_run),
                "time": duration(cost.seconds * len(to_run)) if cost else "",
                "disk": size(cost.bytes * len(to_run)) if cost else "",
                "why": "; ".join(reasons[:_MOST] + more),
            }
        )
    return rows


def plan_total(steps: Sequence[Step], costs: Mapping[str, Cost]) -> str:
    """Say in one line what a plan comes to. What it calls time is that of the stages, one after another."""
    to_run = [step.stage for step in steps if not step.cached]
    known = [costs[stage] for stage in to_run if stage in costs]
    unknown = dict.fromkeys(stage for stage in to_run if stage not in costs)
    line = f"{len(steps) - len(to_run)} of {len(steps)} stage runs are cached, {len(to_run)} would run"
    if known:
        line += f": at most {duration(sum(cost.seconds for cost in known))}"
        line += f" and {size(sum(cost.bytes for cost in known))}, if they are like those in the store"
    return line + (f"; never run here before, so not counted: {', '.join(unknown)}" if unknown else "")


def _parts(steps: Sequence[Step]) -> str:
    """The numbers of shards, runs of them drawn together: "1–3, 7 of 8"."""
    found = [match for step in steps if (match := PART.search(step.label))]
    spans: list[list[int]] = []
    for number in sorted(int(match[1]) for match in found):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    listed = ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in spans)
    return f"{listed} of {found[0][2]}" if found else ""


def print_plan(config_path: Path) -> int:
    """Print the plan of a sweep; what is needed for it is read, and nothing is written.

    Args:
        config_path: a YAML file.

    Returns:
        The exit status.

    Raises:
        ProbeError: the sweep cannot be run.
    """
    config = load_config(config_path, must_exist=True)
    store = Store(config.store_root)
    steps, costs = plan(config, preflight(config), store), typical_costs(store)
    *columns, why = (rows := plan_table(steps, costs))[0]
    lines = aligned([columns, *([str(row[name]) for name in columns] for row in rows)])
    for line, reason in zip(lines, [why, *(row[why] for row in rows)], strict=True):
        print(f"{line}  {reason}".rstrip())
    print(f"\n{plan_total(steps, costs)}.")
    return 0
