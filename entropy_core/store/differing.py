"""Where two artifacts of a stage first differ, for people."""

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from entropy_core.store.artifact import Artifact

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

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
            return f"{name}: {_where(old, new, name)}"
    was, now = old.summary, new.summary
    differing = (name for name in [*was, *now] if was.get(name) != now.get(name))
    return next(
        (f"summary: {name}: {_short(was.get(name))} → {_short(now.get(name))}" for name in differing), "nothing"
    )


def _where(old: Artifact, new: Artifact, name: str) -> str:
    if not (old.directory / name).exists():
        return "the old one was not kept"
    if name.endswith(".safetensors"):
        return _in_tensors(old.tensors(name), new.tensors(name))
    if name.endswith(".parquet"):
        return _in_tables(old.table(name), new.table(name))
    with old.path(name).open("rb") as one, new.path(name).open("rb") as other:
        for number, (a, b) in enumerate(zip_longest(one, other, fillvalue=b""), start=1):
            if a != b:
                return f"line {number}: {' → '.join(_short(line.decode(errors='replace').strip()) for line in (a, b))}"
    return "nothing"


def _in_tensors(old: "dict[str, Tensor]", new: "dict[str, Tensor]") -> str:
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"tensor {name} is {'new' if name in new else 'missing'}"
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {tuple(a.shape)} {a.dtype} → {tuple(b.shape)} {b.dtype}"
        unequal = (a != b) & ~((a != a) & (b != b))  # a NaN is no other than a NaN
        if unequal.any():
            index = tuple(unequal.nonzero()[0].tolist())
            return f"{name}{list(index)}: {a[index].item()} → {b[index].item()}"
    return _SAME_VALUES


def _in_tables(old: "pyarrow.Table", new: "pyarrow.Table") -> str:
    if old.schema != new.schema or len(old) != len(new):
        return f"{len(old)} rows of {old.column_names} → {len(new)} rows of {new.column_names}"
    for name in old.column_names:
        for row, (a, b) in enumerate(zip(old[name].to_pylist(), new[name].to_pylist(), strict=True)):
            if a != b:
                return f"{name}, row {row}: {_short(a)} → {_short(b)}"
    return _SAME_VALUES


def _short(value: Any) -> str:
    return f"{value!r:.60}"
