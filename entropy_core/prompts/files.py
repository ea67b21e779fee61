"""Read a user's prompt file: JSON Lines or Parquet."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_core.errors import PromptError, one_line

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


def _read_parquet(path: Path) -> list[dict]:
    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PromptError(f"{path} cannot be read: {one_line(error)}", fix="give the path of a Parquet file") from None


def _read_jsonl(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split strings at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}", fix="give the path of a UTF-8 .jsonl file") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}:{number} is not JSON: {one_line(error)}", fix="correct the line") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}:{number} is not a JSON object", fix="write one object per line")
        rows.append(row)
    return rows
