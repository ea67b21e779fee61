"""Read a user's prompt file: JSON Lines, JSON, CSV or Parquet; the first three may be compressed by gzip."""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from entropy_core.errors import PromptError, one_line, shortage, some_names
from entropy_core.files.regular import require_readable

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a file.

    Args:
        path: a file with one of `SUFFIXES`.

    Returns:
        One dictionary per row.

    Raises:
        PromptError: the file cannot be read; names the line of a `.jsonl` file.
    """
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    return {"parquet": _read_parquet, "csv": _read_csv, "json": _read_json}.get(suffix, _read_jsonl)(path)


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


def _text(path: Path) -> str:
    """The text of a file, unpacked where its name says that it is compressed."""
    try:
        content = require_readable(path).read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, MemoryError) as error:
        kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        refused = PromptError(f"{path} cannot be read: {one_line(error)}", fix=f"give the path of a UTF-8 {kind} file")
        raise shortage(error) or refused from None


def _read_csv(path: Path) -> list[dict]:
    """Rows of a CSV file with numbers as numbers, as `load_dataset("csv")` has them; dates stay text."""
    text = _text(path)
    try:
        header = next(csv.reader(io.StringIO(text)), [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise PromptError(
                f"{path} has two columns with one name: {some_names(map(repr, twice))}", fix="rename one of them"
            )
        table = _parsed_csv(text, {})
        dates = {f.name: pa.string() for f in table.schema if pa.types.is_temporal(f.type)}
        return (_parsed_csv(text, dates) if dates else table).to_pylist()
    except (pa.ArrowException, csv.Error) as error:
        if str(error).startswith("Empty CSV"):
            return []
        raise shortage(error) or PromptError(
            f"{path} is not CSV: {one_line(error)}", fix="begin with a line of column names, and quote commas"
        ) from None


def _parsed_csv(text: str, types: dict[str, Any]) -> pa.Table:
    return pa_csv.read_csv(
        io.BytesIO(text.encode()),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types, strings_can_be_null=True),
    )


class _RepeatedKeyError(Exception):
    """An object of JSON has a key twice; not a ValueError, for it is JSON."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys the last one would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _twice(where: str, error: _RepeatedKeyError) -> PromptError:
    return PromptError(f"{where} has an object with the key {error.args[0]!r:.80} twice", fix="remove one of them")


def _read_json(path: Path) -> list[dict]:
    """A list of objects; or, as some write it under this name, one object per line."""
    text = _text(path)
    try:
        rows = json.loads(text, object_pairs_hook=_each_key_once)
    except _RepeatedKeyError as error:
        raise _twice(str(path), error) from None
    except (ValueError, RecursionError):
        return _rows_of_lines(path, text)
    if isinstance(rows, dict) and "\n" not in text.strip():
        return [rows]
    if not isinstance(rows, list):
        raise PromptError(f"{path} is not a list of JSON objects", fix="write [{…}, {…}], or one object per line")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PromptError(f"entry {number} of {path} is not a JSON object", fix="write a list of objects")
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    return _rows_of_lines(path, _text(path))


def _rows_of_lines(path: Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut texts at U+2028, too
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_each_key_once)
        except _RepeatedKeyError as error:
            raise _twice(f"{path}:{number}", error) from None
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number} is not JSON: {one_line(error)}", fix="correct the line") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}:{number} is not a JSON object", fix="write one object per line")
        rows.append(row)
    return rows
