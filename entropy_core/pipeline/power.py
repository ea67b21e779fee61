"""What a recorded sweep says of how large E and U have to be: errors from its tables, seconds from its manifests."""

from collections.abc import Mapping
from typing import Any

from entropy_core.errors import StoreError
from entropy_core.estimates import power
from entropy_core.estimates.power import Components, Size, TTest
from entropy_core.estimates.selection import Row, at_learning_rate, first_of_each
from entropy_core.pipeline.lab import BLOCKS
from entropy_core.pipeline.recorded import read_run
from entropy_core.pipeline.runner import Inputs
from entropy_core.report.recorded_run import RecordedRun
from entropy_core.store import runs
from entropy_core.store.artifact import artifacts_in
from entropy_core.store.store import Store

OF_E = (
    *("sample-e-batch", "score-e-batch", "entropy-gradient", "reward-gradient"),
    *("first-order-e", "importance", "path-integral"),
)
OF_U = (
    *("sample-u-batch", "score-u-batch", "score-u-reference", "reward-u-batch", "discriminate-u", "compute-update"),
    *("first-order-u", "half-steps-u", "reward-shares-u"),
)
"""The stages whose time grows with U; those of E are above."""


def size_of(row: Row, units: str, per_prompt: int) -> Size:
    """Return the independent units of E and the prompts of U of a sweep."""
    return Size(row["n_sequences"] // (per_prompt if units == "prompt" else 1), row["n_prompts_u"])


def planned(
    store: Store,
    run_id: str,
    effect: float | None = None,
    budget: float | None = None,
    intervention: str | None = None,
) -> list[dict[str, Any]]:
    """Plan the sizes of E and U from a recorded sweep.

    Args:
        store: the store with the sweep.
        run_id: its id, or latest.
        effect: the change to be told, nats; None: say what the sweep itself tells.
        budget: seconds for one checkpoint; the best split of it is found.
        intervention: plan for its difference from the run as it is, and not for the change itself.

    Returns:
        A row for each checkpoint and question: `checkpoint`; `question`, this or mean update; `E` and `U`, their sizes
        now; `detects`, the change that they tell with 80 % power; and with an effect or a budget `needs E`, `needs U`,
        `seconds`, and what an even split of as many seconds detects.

    Raises:
        StoreError: there is no such run or intervention, or no error to plan by.
    """
    directory, config, recorded = read_run(store, run_id)
    run = RecordedRun(store.root, directory.name)
    results = run.rows("results")
    of_first = [row for row in results if row["normalization"] == results[0]["normalization"]]
    changed = _differences(run, intervention, results[0]["normalization"]) if intervention else {}
    rows = []
    for row in first_of_each(at_learning_rate(of_first)):
        together = 1 if config.batch_config.E_sampling_mode == "replacement" else config.batch_config.G
        size = size_of(row, config.units_of_e, together)
        [entry] = [entry for entry in recorded if entry["checkpoint"] == row["checkpoint"]]
        seconds = _seconds(store, entry, size)
        if intervention and row["checkpoint"] not in changed:
            continue  # it could not be tried there
        errors = changed[row["checkpoint"]] if intervention else row
        over_u_is_known = errors["se_over_u"] is not None and row["interval_over_u"] == "valid"
        for question, given_u in (("this update", True), ("the mean update", False)):
            if not (given_u or over_u_is_known):
                continue
            components = Components.of_pilot(row, size, given_u)
            if intervention:
                components = Components.of_difference(errors, size, given_u, BLOCKS)
            test = TTest(row["confidence_level"])
            now = {"checkpoint": row["checkpoint"], "question": question, "E": size.of_e, "U": size.of_u}
            now |= {"detects": test.detectable(components, size), "seconds": power.cost(size, seconds)}
            rows.append(now | _wanted(test, components, size, seconds, effect, budget))
    if not rows:
        raise StoreError(
            f"run {directory.name} has no step but 0, so there is no error to plan by",
            fix="name a sweep with a step size, such as importance.etas: [0, 1]",
        )
    return rows


def _wanted(
    test: TTest,
    components: Components,
    size: Size,
    seconds: tuple[float, float],
    effect: float | None,
    budget: float | None,
) -> dict[str, Any]:
    """What an effect needs, or what a budget buys, and what an even split of as many seconds would do."""
    if effect is not None:
        if components.given_u:
            of_e = power.smallest_e(test, components, effect, size.of_u)
            found = None if of_e is None else Size(of_e, size.of_u)
        else:
            found = power.cheapest(test, components, effect, seconds)
    elif budget is not None:
        if components.given_u:
            of_e = int((budget - size.of_u * seconds[1]) / seconds[0])
            found = Size(of_e, size.of_u) if of_e >= components.fewest_e else None
        else:
            found = power.best_for(test, components, seconds, budget)
    else:
        return {}
    if found is None:
        return dict.fromkeys(("needs E", "needs U", "for seconds", "detects then", "even split detects"))
    spent = power.cost(found, seconds)
    even = None if components.given_u else power.even_split(components, seconds, spent)
    return {
        "needs E": found.of_e,
        "needs U": found.of_u,
        "for seconds": spent,
        "detects then": test.detectable(components, found),
        "even split detects": test.detectable(components, even) if even else None,
    }


def _differences(run: RecordedRun, intervention: str, normalization: str) -> Mapping[str, Row]:
    """The deepest row of an intervention, by checkpoint."""
    rows = run.rows("interventions")
    levels = ("predict", "measure")  # the screen has no error over E
    found = [row for row in rows if row["intervention"] == intervention and row["normalization"] == normalization]
    found = [row for row in found if row["level"] in levels]
    if not found:
        tried = sorted({row["intervention"] for row in rows if row["verdict"] != "as it is"})
        raise StoreError(
            f"run {run.id} has not tried the intervention {intervention!r}",
            cause=f"it tried {', '.join(tried)}" if tried else "it has no interventions",
            fix=f"`entropy-probe interventions {run.id} --try {intervention}`, then plan by that run",
        )
    return {row["checkpoint"]: row for row in sorted(found, key=lambda row: levels.index(row["level"]))}


def _seconds(store: Store, entry: Inputs, size: Size) -> tuple[float, float]:
    """The seconds of the stages of a checkpoint for a unit of E, and for a prompt of U."""
    inputs = {name: value for name, value in entry["inputs"].items() if name != "replicates"}
    names = {(artifact.stage, artifact.key) for artifact in artifacts_in(inputs)}
    spent = {"E": 0.0, "U": 0.0}
    for stage, key in runs.with_upstream(store, names):
        batch = "E" if stage in OF_E else "U" if stage in OF_U else None
        if batch:
            spent[batch] += store.manifest(stage, key).get("wall_seconds", 0.0)
    if not all(spent.values()):
        raise StoreError(
            f"the seconds that {entry['checkpoint']} took are not in the store",
            cause="what its numbers were made from was pruned",
            fix="plan by a sweep that is whole, or run this one again",
        )
    return spent["E"] / size.of_e, spent["U"] / size.of_u
