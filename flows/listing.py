"""Lists as the terminal has them."""

from collections.abc import Sequence
from pathlib import Path

from entropy_core.errors import StoreError
from entropy_core.store import runs
from entropy_core.store.store import Store


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns to the left, as wide as they must be; nothing when there are no rows."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows] if rows else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_unusable(root: Path) -> None:
    """Say which runs are not among those that are recorded, and why."""
    for run_id in sorted(set(runs.present(root)) - set(runs.recorded(root))):
        for fault in unusable(Store(root), run_id):
            print(fault)


def unusable(store: Store, run_id: str) -> list[str]:
    """Why a run that has a record does not count as recorded."""
    try:
        runs.finished(store.root, run_id)
    except StoreError as error:
        return [error.fact]
    return []  # it was recorded meanwhile
