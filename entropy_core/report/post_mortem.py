"""The section of the report on the step that the trainer really took: what each part of it did to the entropy."""

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_core.estimates.selection import Row, by_checkpoint
from entropy_core.report.markdown import markdown_rows

PARTS = {
    "tokens": "tokens of U",
    "sampler": "sampler",
    "momentum": "momentum",
    "decay": "weight decay",
    "rounding": "rounding",
    "unexplained": "unexplained",
    "first order": "first order",
    "higher order": "higher order",
    "measured": "ΔH measured",
}


def section(rows: Sequence[Row], samplers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the section.

    Args:
        rows: of `post_mortem.parquet`, of one normalisation.
        samplers: by checkpoint, how far the sampler is from the policy; empty where that was not recorded.

    Returns:
        Lines of markdown; none without a post-mortem.
    """
    if not rows:
        return []
    body = []
    for checkpoint, of_one in by_checkpoint(rows).items():
        values = {row["part"]: row["delta_h"] for row in of_one}
        body.append((checkpoint, *(f"{values[part]:+.3g}" for part in PARTS)))
    lines = [
        "The change of the weights from each checkpoint to the next one, split into its parts, and ⟨∇H, part⟩ of each. "
        "*First order* is their sum, and with *higher order* it is the change that was measured. *Unexplained* is what "
        "neither the step on the recorded batch nor the arithmetic of the optimizer made of the weights.",
        "",
        *markdown_rows(("checkpoint", *PARTS.values()), body),
    ]
    for checkpoint, sampler in samplers.items():
        if sampler:
            [share] = [row["share"] for row in rows if row["checkpoint"] == checkpoint and row["part"] == "sampler"]
            lines += ["", _of_sampler(checkpoint, sampler, share)]
    return lines


def _of_sampler(checkpoint: str, sampler: Mapping[str, Any], share: float | None) -> str:
    distance = (
        f"log π − log μ has a root mean square of {sampler['rms']:.2g} nats, and {sampler['largest']:.2g} at most"
    )
    if not sampler["another"]:
        return f"{checkpoint}: the sampler and the policy are one distribution ({distance})."
    what = (
        "its correction for that" if sampler["corrected"] else "that the step takes these tokens for the policy's own"
    )
    part = "" if share is None else f" is {share:+.2%} of the first-order change"
    return f"**{checkpoint}: the sampler is another distribution than the policy** ({distance}); {what}{part}."
