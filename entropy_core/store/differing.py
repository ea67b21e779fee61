"""Where two artifacts of a stage first differ, for people."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from entropy_core.artifact import Artifact

_SAME_VALUES = "the values are the same, and the bytes are not: another release of the library wrote them"


def first_difference(old: Artifact, new: Artifact) -> str:
    """The first file in which two artifacts differ, and where; else the entry of the summary.

    Args:
        old: the one.
        new: the other.

    Returns:
        Such as "tokens.safetensors: logprobs[17]: -0.25 → -0.5".
    """
    before, after = old.manifest["files"], new.manifest["files"]
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            return f"{name} is {'new' if name in after else 'missing'}"
        if before[name]["sha256"] != after[name]["sha256"]:
            return f"{name}: {_where(old.directory / name, new.directory / name)}"
    was, now = old.summary, new.summary
    differing = (name for name in [*was, *now] if was.get(name) != now.get(name))
    return next((f"summary: {name}: {was.get(name)!r:.60} → {now.get(name)!r:.60}" for name in differing), "nothing")


def _where(old: Path, new: Path) -> str:
    if not old.exists():
        return "the old one was not kept"
    if old.suffix == ".safetensors":
        return _in_tensors(old, new)
    if old.suffix == ".parquet":
        return _in_tables(old, new)
    with old.open("rb") as one, new.open("rb") as other:
        for number, (a, b) in enumerate(zip_longest(one, other, fillvalue=b""), start=1):
            if a != b:
                texts = (line.decode(errors="replace").strip() for line in (a, b))
                return f"line {number}: {' → '.join(f'{text!r:.60}' for text in texts)}"
    return "nothing"


def _in_tensors(old: Path, new: Path) -> str:
    from safetensors import safe_open

    with safe_open(old, "pt") as one, safe_open(new, "pt") as other:
        before, after = set(one.keys()), set(other.keys())
        for name in sorted(before | after):
            if name not in before & after:
                return f"tensor {name} is {'new' if name in after else 'missing'}"
            a, b = one.get_tensor(name), other.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: {tuple(a.shape)} {a.dtype} → {tuple(b.shape)} {b.dtype}"
            unequal = (a != b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a != b
            if unequal.any():
                index = tuple(unequal.nonzero()[0].tolist())
                return f"{name}{list(index)}: {a[index].item()} → {b[index].item()}"
    return _SAME_VALUES


def _in_tables(old: Path, new: Path) -> str:
    import pyarrow.parquet

    one, other = (pyarrow.parquet.ParquetFile(path).read() for path in (old, new))
    if one.schema != other.schema or len(one) != len(other):
        return f"{len(one)} rows of {one.column_names} → {len(other)} rows of {other.column_names}"
    for name in one.column_names:
        pairs = zip(one[name].to_pylist(), other[name].to_pylist(), strict=True)
        for row, (a, b) in enumerate(pairs):
            if a != b:
                return f"{name}, row {row}: {_short(a)} → {_short(b)}"
    return _SAME_VALUES


def _short(value: Any) -> str:
    return f"{value!r:.60}"
