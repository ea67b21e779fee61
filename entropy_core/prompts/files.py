"""Read a user's prompt file: JSON Lines or Parquet."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_core.errors import PromptError, one_line, shortage, some_names
from entropy_core.files.regular import require_readable

SUFFIXES = (".jsonl", ".parquet")


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a file.

    Args:
        path: a `.jsonl` or `.parquet` file.

    Returns:
        One dictionary per row.

    Raises:
        PromptError: the file cannot be read; names the line of a `.jsonl` file.
    """
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def holds(column: pa.DataType, kind: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is of a kind, or has one of it inside."""
    return kind(column) or any(holds(column.field(i).type, kind) for i in range(column.num_fields))


def _read_parquet(path: Path) -> list[dict]:
    try:
        table = pq.ParquetFile(require_readable(path)).read()
        if maps := [field.name for field in table.schema if holds(field.type, pa.types.is_map)]:
            raise PromptError(
                f"{path} has columns of maps, whose entries have no names: {some_names(map(repr, maps))}",
                fix="write them as structs, as lists of pairs, or as a text of JSON",
            )
        return table.to_pylist()
    except PromptError:
        raise
    except Exception as error:  # of values of all kinds, some have no form in Python
        refused = PromptError(f"{path} cannot be read: {one_line(error)}", fix="give the path of a Parquet file")
        raise shortage(error) or refused from None


def _read_jsonl(path: Path) -> list[dict]:
    try:
        lines = (
            require_readable(path).read_text(encoding="utf-8-sig").split("\n")
        )  # splitlines() would cut texts at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        refused = PromptError(f"{path} cannot be read: {one_line(error)}", fix="give the path of a UTF-8 .jsonl file")
        raise shortage(error) or refused from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number} is not JSON: {one_line(error)}", fix="correct the line") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}:{number} is not a JSON object", fix="write one object per line")
        rows.append(row)
    return rows
