"""What the report says of E: where no interval over it is valid, and how it was drawn if not by the policy."""

from collections.abc import Sequence

from entropy_core.estimates.selection import Row
from entropy_core.report.markdown import markdown_rows


def invalid_over_e(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each checkpoint without a valid interval over E; rows are of the result table."""
    why = {row["checkpoint"]: row["interval_over_e"] for row in rows if row["interval_over_e"] != "valid"}
    return [f"{name}: {reason}." for name, reason in why.items()]


def section(rows: Sequence[Row]) -> list[str]:
    """Return the table of the weights of E, one row per checkpoint; nothing if the policy drew E."""
    first = {row["checkpoint"]: row for row in reversed(rows) if row["sampler"] != "policy"}
    body = [
        (
            checkpoint,
            f"{row['sampler_ess_fraction']:.3f}",
            f"{row['sampler_ess_prefix']:.0f}",
            "–" if row["sampler_pareto_k"] is None else f"{row['sampler_pareto_k']:.2f}",
            f"{row['mean_weight']:.4f} (z {row['mean_weight_z']:+.2f})",
            f"{row['mean_score_z']:+.2f}",
            f"{row['mean_surprisal_z']:+.2f}",
            f"{row['mean_logprob_difference']:.2g}, {row['largest_logprob_difference']:.2g}",
        )
        for checkpoint, row in reversed(first.items())
    ]
    if not body:
        return []
    head = (
        "checkpoint",
        "ESS/N",
        "smallest prefix ESS",
        "Pareto k̂",
        "mean weight",
        "mean score z",
        "mean excess surprisal z",
        "mean and largest \\|log π − log q\\|",
    )
    return [
        *markdown_rows(head, body),
        "",
        "Another distribution q than the policy π drew E, and every estimate has weights π/q. The mean weight must be "
        "1, and the mean score and the mean of surprisal minus entropy 0, within their errors. Otherwise E was not "
        "drawn from the q that was recorded, and there is no interval.",
    ]
