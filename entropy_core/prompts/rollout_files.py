"""Find the rollouts of one step among the files that a trainer recorded, and read them.

    ProbeCallback    entropy-probe/batches/checkpoint-5.parquet      token ids, advantages
    TRL              completions/completions_00005.parquet           texts, advantages
    verl             5.jsonl in trainer.rollout_data_dir             texts, rewards
    open-instruct    NAME_rollouts_000000.jsonl, of many steps       token ids, rewards, advantages, log-probabilities
    prime-rl         rollouts/step_4/rollouts.bin                    token ids, rewards, advantages, log-probabilities
    yours            a Parquet or JSON Lines file                    any of these columns

What a file holds is read as data and checked value by value: it may come from anywhere.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from entropy_core.errors import ConfigError, PromptError, one_line, shortage, some_names
from entropy_core.files.regular import require_readable
from entropy_core.prompts.conversations import fault_of
from entropy_core.prompts.packed_rollouts import PACKED, unpacked

COLUMNS = {
    "prompt_ids": ("prompt_ids", "prompt_token_ids", "prompt_tokens"),
    "response_ids": ("completion_ids", "response_ids", "response_token_ids", "response_tokens"),
    "prompt": ("prompt", "input"),
    "response": ("completion", "response", "output"),
    "reward": ("reward", "score"),
    "advantage": ("advantage", "advantages"),
    "old_logprobs": ("old_logprobs", "old_log_probs"),
    "sampling_logprobs": ("sampling_logprobs", "logprobs", "completion_logprobs", "rollout_log_probs"),
    "ref_logprobs": ("ref_logprobs", "reference_logprobs", "ref_log_prob"),
    "group": ("group", "prompt_idx", "uid"),
    "step": ("step",),
    "finish_reason": ("finish_reason",),
}
"""What is read of a row, by our name for it, and what trainers call it."""

SUFFIXES = (".parquet", ".jsonl", ".json")
MOST_ROWS, MOST_BYTES = 1_000_000, 2**32
"""Of a file: far more than a batch has, and few enough for the memory of one process."""
_BATCH = 64  # rows that are unpacked at once, before their size is looked at
_OF_TRL = re.compile(r"completions_\d+\.parquet")
NAMED_BY_STEP = re.compile(r"(?:checkpoint-|completions_|step_)?(\d+)\.(?:parquet|jsonl?)")
"""A file whose name says of which step it is."""
_OF_MANY_STEPS = re.compile(r"_rollouts_\d+\.jsonl")

Row = dict[str, Any]


class NoRolloutsError(ConfigError):
    """Nothing was recorded of a step."""


def files_of_step(source: Path, number: int) -> list[Path]:
    """Find the files with the rollouts of a step.

    Args:
        source: a file, which may be of several steps; or a folder with a file or a folder for each step, whose name
            ends with the step's number; or one with files of many steps, as open-instruct writes them.
        number: of the step, as these files count.

    Returns:
        The files; all of them where each may have rows of the step.

    Raises:
        NoRolloutsError: there are none of this step; the message says of which there are.
    """
    if not source.is_dir():
        named = NAMED_BY_STEP.fullmatch(source.name)
        if named and int(named[1]) != number:
            raise no_such_step(source, number, [int(named[1])])
        return [source]
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    if shards := [entry for entry in entries if _OF_MANY_STEPS.search(entry.name)]:
        return shards
    numbered: dict[int, list[Path]] = {}
    for entry in entries:
        digits = re.findall(r"\d+", entry.name if entry.is_dir() else entry.stem)
        if digits and (entry.is_dir() or entry.suffix in SUFFIXES):
            numbered.setdefault(int(digits[-1]), []).append(entry)
    found: list[Path] = []
    for entry in numbered.get(number, ()):
        inside = sorted(entry.iterdir()) if entry.is_dir() else [entry]
        found += [file for file in inside if file.suffix in SUFFIXES or file.name == PACKED]
    if not found:
        raise no_such_step(source, number, sorted(numbered))
    return found


def no_such_step(source: Path, number: int, there: Sequence[int]) -> NoRolloutsError:
    """The error for a step that nothing was recorded of."""
    listed = some_names(map(str, there)) if there else "no step's"
    return NoRolloutsError(
        f"{source} has no rollouts of step {number}; it has those of {listed}",
        cause="the trainer records fewer steps than it saves, or counts its steps from another number",
        fix="probe a checkpoint whose next step is there, or set batch_config.U.first_step to what the files give to "
        "the first step of a training",
    )


def counts_from(source: Path) -> int:
    """The number that a trainer's files give to the first step of a training: prime-rl's 0, all others' 1."""
    packed = source.is_dir() and next(source.glob(f"*/{PACKED}"), None)
    return 0 if packed or source.name == PACKED else 1


def read_rollouts(files: Sequence[Path], number: int) -> list[Row]:
    """Read the rollouts of a step.

    Args:
        files: from `files_of_step`.
        number: of the step; rows that say to be of another step are left out.

    Returns:
        A row per response, of the columns of `COLUMNS` that the files have, all of them the same. Token ids and
        log-probabilities are lists, one number per token.

    Raises:
        PromptError: a file cannot be read, is too large, or has a value that cannot be what its column says.
        NoRolloutsError: no row is of this step.
    """
    rows, steps = [], set()
    for file in files:
        for index, raw in enumerate(_raw_rows(file)):
            row = _named(raw, file, index)
            if _OF_TRL.fullmatch(file.name):  # which has a column for each reward function, by its name
                row.pop("reward", None)
            step = row.get("step")
            steps.add(step)
            if step is None or step == number:
                rows.append(_checked(row, file, index))
    if not rows:
        raise no_such_step(files[0], number, sorted(step for step in steps if isinstance(step, int)))
    names = set(rows[0])
    if odd := next((row for row in rows if set(row) != names), None):
        raise PromptError(
            f"the rollouts of {files[0]} have not all the same columns: {some_names(sorted(names ^ set(odd)))}",
            cause="a file that was put together from several runs",
            fix="give every row the same columns",
        )
    if not {"prompt_ids", "prompt"} & names or not {"response_ids", "response"} & names:
        missing = "prompts" if not {"prompt_ids", "prompt"} & names else "responses"
        raise PromptError(
            f"{files[0]} has no {missing}",
            cause="it is another kind of file",
            fix="name the columns prompt_ids and completion_ids (token ids), or prompt and completion (texts)",
        )
    return rows


def _raw_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file as they stand in it, few at a time."""
    try:
        size = require_readable(file).stat().st_size
        if size > MOST_BYTES:
            raise _too_large(file)
        reader = _parquet if file.suffix == ".parquet" else _packed if file.name == PACKED else _json
        for index, row in enumerate(reader(file)):
            if index >= MOST_ROWS:
                raise _too_large(file)
            yield row
    except PromptError:
        raise
    except (Exception, RecursionError) as error:  # pyarrow raises errors of all kinds
        kind = {".parquet": "Parquet", ".bin": "msgpack"}.get(file.suffix, "JSON")
        refused = PromptError(
            f"{file} cannot be read: {one_line(error)}",
            cause="it was cut off, or is still being written",
            fix=f"give the path of a whole {kind} file",
        )
        raise shortage(error) or refused from None


def _too_large(file: Path) -> PromptError:
    return PromptError(
        f"{file} has more than {MOST_ROWS} rows or {MOST_BYTES >> 30} GiB, which is more than a batch",
        cause="a file of another kind, or of a whole training",
        fix="give the files of single steps",
    )


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    with pq.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        chosen, unpacked_bytes = [name for name in names if name in known], 0
        if len(set(chosen)) < len(chosen):
            raise PromptError(f"{file} has two columns with one name", fix="rename one of them")
        if opened.metadata.num_rows > MOST_ROWS:
            raise _too_large(file)
        for batch in opened.iter_batches(batch_size=_BATCH, columns=chosen):
            unpacked_bytes += batch.nbytes
            if unpacked_bytes > MOST_BYTES:
                raise _too_large(file)
            yield from batch.to_pylist()


def _json(file: Path) -> Iterator[Mapping[str, Any]]:
    """One object per line, or a list of objects."""
    with file.open(encoding="utf-8") as lines:
        first = lines.read(1)
        lines.seek(0)
        rows = json.load(lines) if first == "[" else (json.loads(line) for line in lines if line.strip())
        for row in rows:
            if not isinstance(row, dict):
                raise PromptError(f"{file} has something else than objects", fix="write one object per line")
            yield row


def _packed(file: Path) -> Iterator[Mapping[str, Any]]:
    yield from unpacked(file.read_bytes())


def _named(raw: Mapping[str, Any], file: Path, index: int) -> Row:
    """The columns that are known, under our names."""
    row: Row = {}
    for name, aliases in COLUMNS.items():
        there = [alias for alias in aliases if alias in raw]
        if len(there) > 1:
            raise _wrong(file, index, f"two columns for one thing, {some_names(there)}", "leave one of them out")
        if there and (raw[there[0]] is not None or name == "reward"):  # a response may have no reward
            row[name] = raw[there[0]]
    return row


def _checked(row: Row, file: Path, index: int) -> Row:
    """The row, once each value is what its column says."""
    for name in ("prompt_ids", "response_ids"):
        ids = row.get(name, [0])
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise _wrong(file, index, f"something else than token ids as its {name}", "write a list of integers")
    for name in ("old_logprobs", "sampling_logprobs", "ref_logprobs"):
        if name not in row:
            continue
        values = row[name]
        if not isinstance(values, list) or not all(_is_number(x) and x <= 1e-3 for x in values):
            raise _wrong(file, index, f"something else than log-probabilities as its {name}", "write a list of numbers")
        if len(values) != len(row.get("response_ids", ())):
            fact = f"{len(values)} {name} of {len(row.get('response_ids', ()))} response tokens"
            raise _wrong(file, index, fact, "write one per token, or leave them out")
    if isinstance(row.get("advantage"), list):  # one per token
        if len(set(row["advantage"])) != 1:
            raise _wrong(file, index, "advantages that differ within a response", "these are not modelled: one per row")
        row["advantage"] = row["advantage"][0]
    for name in ("reward", "advantage"):
        value = row.get(name, 0.0)
        if isinstance(value, bool):
            row[name] = value = float(value)
        if value is not None and not _is_number(value):
            raise _wrong(file, index, f"no finite number as its {name}", "write a number, or leave the column out")
    prompt, response = row.get("prompt", ""), row.get("response", "")
    row |= {name: _text_of(value) for name, value in (("response", response),) if name in row}
    if not isinstance(prompt, str) and (not isinstance(prompt, list) or fault_of(prompt)):
        raise _wrong(file, index, "neither a text nor a conversation as its prompt", "write one of them")
    if not isinstance(row.get("response", ""), str):
        raise _wrong(file, index, "no text as its completion", "write a text, or token ids as completion_ids")
    if not isinstance(row.get("finish_reason", ""), str) or not isinstance(row.get("group", 0), int | str):
        raise _wrong(file, index, "a finish_reason or a group of another type", "write a text; a number or a text")
    return row


def _text_of(response: Any) -> Any:
    """The text of a completion that is a conversation of one turn, as TRL logs it."""
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):
        return response[0].get("content")
    return response


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(file: Path, index: int, fact: str, fix: str) -> PromptError:
    return PromptError(f"rollout {index} of {file} has {fact}", fix=fix)
