"""Tables in markdown."""

from collections.abc import Sequence


def markdown_rows(head: Sequence[str], body: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Return the lines of a markdown table; `text_columns` columns are left-aligned, the others right-aligned."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
