"""The page of a comparison: what differs, in a plain paragraph, then the table and the settings that differ."""

from collections.abc import Mapping, Sequence

from entropy_core.estimates.selection import Row, unit_of
from entropy_core.report.markdown import markdown_rows

_NAMES = {"H": "H", "delta_h1": "δH₁", "delta_h": "ΔH"}
_SHARED_E = {
    "same batch": "E is the same batch in both, so that the errors of a difference are paired sequence by sequence",
    "same prompts": "the sequences of E answer the same prompts in both, so that the errors of a difference are paired "
    "sequence by sequence",
    "other prompts": "E has other prompts in each, so that the errors over E are independent and their squares add",
}
_SHARED_U = {
    "same step": "both take the same step on the same U",
    "same prompts": "U has the same prompts in both, and is paired prompt by prompt",
    "other prompts": "U has other prompts in each, and its errors are independent, too",
}


def markdown(
    rows: Sequence[Row],
    changes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Sequence[str]],
    provenance: Sequence[Mapping[str, str]],
) -> str:
    """Write the page of a comparison.

    Args:
        rows: of `tables.COMPARISON`.
        changes: by the name of what is compared, the settings in which it differs from the first, in a few words each.
        settings: by key the values in all runs, for those that differ.
        provenance: of each run.

    Returns:
        Markdown; the figure is linked by file name.
    """
    first, *others = changes
    shown = _of_first_normalization(rows)
    lines = [f"# {first} compared with {', '.join(others)}", ""]
    lines += [line for said in answers(rows, changes) for line in (said, "")]
    lines += ["![entropy and its predicted change along the training, a curve per run](compare.png)", ""]
    if rows:
        lines += ["## Checkpoint by checkpoint", "", *_table(shown), "", _about(rows[0]), ""]
    if settings:
        runs = [f"`{one['run']}`" for one in provenance]
        body = [(f"`{key}`", *(f"`{value}`" for value in values)) for key, values in settings.items()]
        lines += ["## Settings that differ", "", *markdown_rows(("setting", *runs), body, 1 + len(runs)), ""]
    names = dict.fromkeys(name for one in provenance for name in one)
    body = [(name, *(f"`{one[name]}`" if one.get(name) else "–" for one in provenance)) for name in names]
    lines += ["## Provenance", "", *markdown_rows(("", *("" for _ in provenance)), body, 1 + len(provenance))]
    return "\n".join(lines) + "\n"


def answers(rows: Sequence[Row], changes: Mapping[str, Sequence[str]]) -> list[str]:
    """Say in one paragraph for each of the others how it differs from the first; the arguments are those of `markdown`.

    Returns:
        Plain sentences, about the first normalisation.
    """
    first, *others = changes
    shown = _of_first_normalization(rows)
    return [_answer([row for row in shown if row["other_run"] == name], first, name, changes[name]) for name in others]


def _of_first_normalization(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["normalization"] == rows[0]["normalization"]]


def _answer(rows: Sequence[Row], first: str, other: str, changes: Sequence[str]) -> str:
    if not rows:
        return f"{other} has no checkpoint of a step that {first} has, so that the figure alone compares them."
    steps = list(dict.fromkeys(row["step"] for row in rows))
    at = {(row["step"], row["quantity"]): row for row in rows}
    same = rows[0]["shared_e"] == "same batch" and rows[0]["shared_u"] == "same step"
    how = f"{_SHARED_E[rows[0]['shared_e']]}; {_SHARED_U[rows[0]['shared_u']]}."
    of_h1 = [at[step, "delta_h1"] for step in steps]
    if same:
        changed = ", ".join(changes) or "nothing that changes a number"
        what = f"{other} estimates from the same E and the same step as {first}; what differs is {changed}."
        return f"{what} {_same_estimates(of_h1)} {_sentence(how)}"
    last = steps[-1]
    unit = unit_of(rows[0]["normalization"])
    said = [
        f"At step {last}, the last that both have, the next step of {other} changes the entropy by "
        f"{_signed(at[last, 'delta_h1']['other_value'])} {unit}, and that of {first} by "
        f"{_signed(at[last, 'delta_h1']['value'])} (δH₁): {_how_far(at[last, 'delta_h1'])}."
    ]
    if len(steps) > 1:
        said.append(f"Over the {len(steps)} steps that both have, {_counted(of_h1, 'δH₁')}.")
    of_h = at[last, "H"]
    said.append(
        f"The entropy of {other} is then {of_h['other_value']:.4g}, and that of {first} {of_h['value']:.4g}: "
        f"{_how_far(of_h)}."
    )
    if changes:
        said.append(f"Besides the checkpoints, the settings differ: {', '.join(changes)}.")
    return " ".join([*said, _sentence(how)])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _same_estimates(rows: Sequence[Row]) -> str:
    """How two ways to estimate δH₁ differ: in the estimates, and in their standard errors."""
    if all(row["verdict"] == "equal" for row in rows):
        return "No estimate differs."
    sizes = [abs(row["difference"] / row["value"]) for row in rows if row["value"]]
    errors = [row["other_value_se"] / row["value_se"] for row in rows if row["value_se"]]
    over = f"Over {len(rows)} checkpoints, " if len(rows) > 1 else ""
    said = f"{over}δH₁ differs by up to {100 * max(sizes, default=0.0):.2g} %, and {_counted(rows, 'it')}"
    if errors:
        low, high = f"{min(errors):.2f}", f"{max(errors):.2f}"
        said += f"; its standard error over E is {low if low == high else f'{low} to {high}'} times that of the first"
    return f"{said}."


def _how_far(row: Row) -> str:
    if row["verdict"] == "equal":
        return "no difference"
    size = f"a difference of {_signed(row['difference'])}{_interval(row, 'this_update')}"
    return f"{size}, which {'may be' if row['verdict'] == 'cannot tell' else 'is more than'} chance"


def _counted(rows: Sequence[Row], what: str) -> str:
    told = sum(row["verdict"] in ("higher", "lower") for row in rows)
    if len(rows) == 1:
        return f"{what} differs by {'more than chance' if told else 'no more than chance explains'}"
    return f"{what} differs by more than chance at {told or 'none'} of them"


def _table(rows: Sequence[Row]) -> list[str]:
    head = (
        "step",
        "quantity",
        "compared with",
        "first",
        "other",
        "difference",
        "for this update",
        "for the mean update",
        "for the next update",
        "verdict",
    )
    body = []
    for row in rows:
        ends = (_interval(row, f"{update}_update").strip() or "–" for update in ("this", "mean", "next"))
        values = (
            f"{_signed(row[name], row['quantity'])} (SE {row[f'{name}_se']:.2g})" if row[name] is not None else "–"
            for name in ("value", "other_value", "difference")
        )
        body.append((f"{row['step']}", _NAMES[row["quantity"]], row["other_run"], *values, *ends, row["verdict"]))
    return markdown_rows(head, body, 3)


def _about(row: Row) -> str:
    level = f"{100 * row['confidence_level']:.10g} %"
    return (
        f"In {unit_of(row['normalization'])}; a difference is the other value less the first. The changes are at the "
        "learning rate of each checkpoint, or at the step size closest to it that both measured. Brackets are intervals"
        f" at {level} for one difference, and are not adjusted for their number: *this update*, of the two steps on "
        "these U, with the randomness of E; *the mean update* and *the next update*, on batches like U, with that of E "
        "and U. Of H and ΔH only the randomness of E is known."
    )


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f" [{_signed(low)}, {_signed(high)}]"


def _signed(value: float, quantity: str = "") -> str:
    return f"{value:.4g}" if quantity == "H" else f"{value:+.3g}"
