"""The section of the report on the expected reward: what a step does to it, and how much entropy goes with it."""

from collections.abc import Mapping, Sequence

from entropy_core.estimates.selection import Row, at_learning_rate, by_checkpoint, first_of_each
from entropy_core.report.markdown import markdown_rows


def at_the_learning_rate(rows: Sequence[Row]) -> list[Row]:
    """Select the row of each checkpoint at the step size closest to the learning rate."""
    return first_of_each(at_learning_rate([{**row, "learning_rate": row["eta"] / row["eta_over_lr"]} for row in rows]))


def sentence(rows: Sequence[Row]) -> str:
    """Say what the step of the last checkpoint does to the expected reward, and what it pays for it in entropy.

    Args:
        rows: of `price.parquet`, of one normalisation.

    Returns:
        One or two sentences without markup; empty without rows.
    """
    if not rows:
        return ""
    row = at_the_learning_rate(rows)[-1]
    where = f"At {row['checkpoint']} the step"
    if row["verdict"] == "weights-unreliable":
        return (
            f"{where} cannot be said to raise or to lower the expected reward: the importance weights are unreliable."
        )
    change = f"{row['delta_j']:+.2g} {_interval(row, 'delta_j')}"
    if row["verdict"] == "cannot tell":
        return (
            f"{where} changes the expected reward of {row['J']:.3g} by {change}: whether it rises cannot be told. This "
            f"E tells changes from {row['minimum_detectable']:.2g} up."
        )
    does = "raises" if row["verdict"] == "reward rises" else "lowers"
    said = f"{where} {does} the expected reward of {row['J']:.3g} by {change}"
    if row["price_low"] is None or row["price_low"] <= 0 <= row["price_high"]:
        return f"{said}; what that costs in entropy cannot be told."
    lost = "" if does == "raises" else " lost"
    verb = "gains" if (row["price"] > 0) == (does == "raises") else "costs"
    return f"{said}; each 0.01 of reward{lost} {verb} {_hundredth(row)} of entropy."


def of_tokens(checkpoint: str, bought: Mapping[str, float]) -> str:
    """Say what the tokens of U do that cost entropy and buy no reward; see `estimates.bought`."""
    part = bought["entropy"] / bought["cost"] if bought["cost"] else 0.0
    return (
        f"{checkpoint}: the tokens of U that lower the entropy change it by {bought['cost']:+.3g}. {part:.0%} of that "
        f"is by tokens that buy no reward by one half of E ({bought['tokens']:.0%} of all tokens). By the other half "
        f"these change the expected reward by {bought['reward']:+.2g}, and all tokens by "
        f"{bought['reward_of_all']:+.2g}."
    )


def section(rows: Sequence[Row], without: int, bought: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the section on the expected reward.

    Args:
        rows: of `price.parquet`, of one normalisation.
        without: how many responses of E have no reward; then there are no rows.
        bought: by checkpoint, what the tokens of U do that cost entropy and buy no reward.

    Returns:
        Lines of markdown; none if no rewards were asked for.
    """
    if without:
        return [f"{without} responses of E have no reward, so that nothing is said of the expected reward."]
    if not rows:
        return []
    body = [
        (
            name,
            f"{row['eta_over_lr']:g}",
            f"{row['J']:.4g}",
            f"{row['delta_j1']:+.3g} {_interval(row, 'delta_j1')}",
            "–" if row["delta_j"] is None else f"{row['delta_j']:+.3g} {_interval(row, 'delta_j')}",
            "–" if row["delta_h"] is None else f"{row['delta_h']:+.3g}",
            "–" if row["price_low"] is None else f"{row['price']:+.3g} {_interval(row, 'price')}",
            row["verdict"],
        )
        for name, group in by_checkpoint(rows).items()
        for row in group
    ]
    head = ("checkpoint", "η / lr", "J", "δJ₁, this update", "ΔJ, this update", "ΔH", "ΔH/ΔJ, this update", "verdict")
    return [
        *markdown_rows(head, body),
        "",
        "J is the expected reward of the policy, on E. δJ₁ and ΔJ are what the step does to it, predicted to first "
        "order and measured, on the same sequences as the entropy. ΔH/ΔJ is the price: the nats that go with each unit "
        "of reward. Its bracket is Fieller's, which allows for a ΔJ near 0; where ΔJ is not told from 0 there is none. "
        "The brackets have the randomness of E alone.",
        *(line for name, of_one in bought.items() for line in ("", of_tokens(name, of_one))),
    ]


def _interval(row: Row, name: str) -> str:
    return f"[{row[f'{name}_low']:+.2g}, {row[f'{name}_high']:+.2g}]"


def _hundredth(row: Row) -> str:
    unit = "nats per token" if row["normalization"] == "per_token" else "nats per response"
    low, high = sorted(abs(row[f"price_{end}"]) / 100 for end in ("low", "high"))
    return f"{abs(row['price']) / 100:.2g} {unit} [{low:.2g}, {high:.2g}]"
