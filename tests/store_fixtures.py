"""Stages that are quick, and stores to run them in."""

import math

import pydantic
import pytest

from entropy_core.store.store import Stage, Store

EXECUTED: list[dict] = []


def draw(out, execution, **inputs):
    EXECUTED.append(inputs)
    out.json(list(range(inputs.get("n", 3))), "numbers.json")
    out.path("more/text.txt").write_text(f"seed {inputs.get('seed')}")
    return {"n": inputs.get("n", 3), "mean": 0.1}


def constant(out, execution, **inputs):
    out.json("always the same", "data.json")
    return {}


def total(out, execution, numbers):
    EXECUTED.append({"numbers": numbers})
    return {"sum": sum(numbers.json("numbers.json"))}


def fails(out, execution, error):
    out.json([1], "half.json")
    raise {"value": ValueError("no"), "interrupt": KeyboardInterrupt()}[error]


def fills_the_disk(out, execution, how):
    out.json([1], "half.json")
    if how == "device":
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def writes_everything(out, execution, values):
    import pyarrow
    import torch

    x = torch.tensor(values)
    metadata = {name: f"{name} of «τ»\n" for name in "abcdefgh"}
    out.tensors({"x": x, "column": x.reshape(-1, 1).t(), "same": x, "half": x.bfloat16() * 2}, metadata=metadata)
    out.tensors({}, name="empty.safetensors")
    out.table(pyarrow.table({"sequence_id": [0, 1], "reward": [0.5, None]}), "rows.parquet")
    out.json({"b": 1, "a": [None, "η"]}, "notes.json")
    return {}


def returns(out, execution, what):
    return {"list": [1], "nan": {"x": math.nan}, "object": {"x": object()}, "keys": {10: 1, 9: {"b": (1, 2)}}}[what]


DRAW, CONSTANT, TOTAL = Stage("draw", draw), Stage("constant", constant), Stage("total", total)
FAILS, FILLS, RETURNS = Stage("fails", fails), Stage("fills", fills_the_disk), Stage("returns", returns)


class Settings(pydantic.BaseModel):
    size: int = 2
    rate: float = 0.5
    device: object = None


@pytest.fixture
def store(tmp_path):
    """A new store; nothing has been executed."""
    EXECUTED.clear()
    return Store(tmp_path / "store")


def visible(store):
    """Everything under the root but locks and quarantine."""
    paths = (path.relative_to(store.root) for path in store.root.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] not in (".locks", ".quarantine")}


def quarantined(store):
    folder = store.root / ".quarantine"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def flip_a_byte(directory):
    path = directory / "more" / "text.txt"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
