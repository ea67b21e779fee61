"""`training_args.bin` is read, and nothing in it runs: payloads of every kind leave no trace."""

import builtins
import enum
import io
import os
import pickle
import struct
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_core.checkpoints.inert_pickle import MOST_BYTES, Inert, PickleError, plain, read_pickle
from entropy_core.checkpoints.training_args import read_training_arguments
from entropy_core.errors import CheckpointError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = {
    "none": None,
    "truth": [True, False],
    "numbers": [0, -1, 255, 65536, -(2**40), 1.5, float("inf")],
    "text": ["", "group", "ä→", "a\nb"],
    "nested": {"a": [{"b": [1, [2, [3]]]}]},
}


class Arguments:
    """A record of settings, as a trainer's is one."""

    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


class SetsState:
    """Unpickled, it runs its own code."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["witness"]).touch()


class CallsWithState(Calls):
    def __reduce__(self) -> Any:
        return (*self.what, {"temperature": 0.5})


class Kind(enum.StrEnum):
    STEPS = "steps"


Kind.__module__ = "transformers.trainer_utils"


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, name: str = "training_args") -> Path:
    """What torch.save writes around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as written:
        written.writestr(f"{name}/data.pkl", pickled)
        written.writestr(f"{name}/version", "3\n")
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_out_as_they_are(protocol):
    assert plain(read_pickle(pickle.dumps(PLAIN, protocol))) == PLAIN
    assert plain(read_pickle(pickle.dumps((1, {2}, frozenset({3})), protocol)))[:1] == [1]
    record = read_pickle(pickle.dumps(Arguments(temperature=0.7, top_p=1), protocol))
    assert isinstance(record, Inert) and plain(record) == {"temperature": 0.7, "top_p": 1}


def test_what_shares_parts_is_read():
    inner = [1]
    assert plain(read_pickle(pickle.dumps([inner, inner]))) == [[1], [1]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_member_of_an_enumeration_is_its_value(protocol, monkeypatch):
    class Module:
        Kind = Kind

    monkeypatch.setitem(__import__("sys").modules, "transformers.trainer_utils", Module)
    assert plain(read_pickle(pickle.dumps(Kind.STEPS, protocol))) == "steps"
    other = plain(read_pickle(pickle.dumps(torch.device("cpu"), protocol)))
    assert isinstance(other, Inert) and other.name == "torch.device"


PAYLOADS = {
    "a command": lambda w: Calls(os.system, f"touch {w}"),
    "a directory": lambda w: Calls(os.mkdir, str(w)),
    "eval": lambda w: Calls(builtins.eval, f"__import__('os').mkdir({str(w)!r})"),
    "exec": lambda w: Calls(builtins.exec, f"__import__('os').mkdir({str(w)!r})"),
    "state": lambda w: SetsState(str(w)),
    "a call with state": lambda w: CallsWithState(os.mkdir, str(w)),
    "nested": lambda w: [{"a": (Calls(os.mkdir, str(w)), [SetsState(str(w))])}],
    "as a key": lambda w: {Calls(os.mkdir, str(w)): 1},
    "in arguments": lambda w: Calls(print, Calls(os.mkdir, str(w))),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_runs(tmp_path, payload, protocol):
    witness = tmp_path / "witness"
    planted = PAYLOADS[payload](witness)
    pickled = pickle.dumps(Arguments(temperature=0.5, planted=planted), protocol)
    # The payload works: where it is unpickled it leaves its trace.
    with suppress(TypeError, AttributeError):  # its result takes no state
        pickle.loads(pickled)
    assert witness.exists()
    (witness.rmdir if witness.is_dir() else witness.unlink)()

    found = read_training_arguments(archive(tmp_path / "training_args.bin", pickled))
    assert found.values["temperature"] == 0.5 and "planted" in found.values
    assert not witness.exists()
    with suppress(CheckpointError):  # on its own it is read as a record without meaning, or refused
        read_training_arguments(archive(tmp_path / "training_args.bin", pickle.dumps(planted, protocol)))
    assert not witness.exists()


def test_a_file_of_torch_is_read_with_and_without_its_archive(tmp_path):
    path = tmp_path / "training_args.bin"
    for zipped in (True, False):
        torch.save(Arguments(beta=0.04, deep=[{"a": 1}]), path, _use_new_zipfile_serialization=zipped)
        found = read_training_arguments(path)
        assert found.values == {"beta": 0.04, "deep": [{"a": 1}]} and found.kind.endswith("Arguments")
    path.write_bytes(pickle.dumps(Arguments(beta=0.04)))
    assert read_training_arguments(path).values == {"beta": 0.04}
    torch.save(Arguments(weights=torch.zeros(3), beta=0.1), path)  # its numbers are elsewhere, under a persistent id
    found = read_training_arguments(path)
    assert found.values["beta"] == 0.1 and isinstance(found.values["weights"], Inert)


def nested(levels: int) -> bytes:
    return b"]" * levels + b"a" * (levels - 1) + b"."


def billion() -> bytes:
    """A list of two of the list before, a hundred times: small, and without an end when it is written out."""
    return b"(lp0\n0" + b"".join(b"(g%d\ng%d\nlp%d\n0" % (i, i, i + 1) for i in range(100)) + b"g100\n."


BAD = {
    "empty": b"",
    "text": b"hello",
    "half": pickle.dumps(Arguments(a=1, b="long" * 100))[:-30],
    "without an end": b"]",
    "an empty stack": b"0.",
    "a mark": b"(.",
    "unknown operation": b"\xff.",
    "an extension": b"\x82\x01.",
    "a buffer": b"\x97.",
    "memory that is not there": b"h\x07.",
    "a large place in memory": b"]r\xff\xff\xff\x7f.",
    "a long text that is cut off": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a number of many digits": b"L" + b"9" * 10**5 + b"L\n.",
    "nested": b"c__main__\nA\n(tR" + b"}X\x01\x00\x00\x00a" + nested(10**5)[:-1] + b"sb.",
    "a billion": b"c__main__\nA\n(tR}X\x01\x00\x00\x00a" + billion()[:-1] + b"sb.",
    "too many operations": b"c__main__\nA\n(tR" + b"N0" * 600_000 + b"}b.",
    "a list": pickle.dumps([1]),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_one_error(tmp_path, bad, zipped):
    path = tmp_path / "training_args.bin"
    archive(path, BAD[bad]) if zipped else path.write_bytes(BAD[bad])
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"training_args\.bin cannot be read as the settings of a trainer"):
        read_training_arguments(path)
    assert time.monotonic() - started < 30  # it ends


def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(tmp_path):
    path = archive(tmp_path / "training_args.bin", b"N" * (MOST_BYTES * 8), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MOST_BYTES / 50
    with pytest.raises(CheckpointError, match=f"more than {MOST_BYTES} bytes"):
        read_training_arguments(path)
    path.write_bytes(b"\0" * (MOST_BYTES + 1))
    with pytest.raises(CheckpointError, match="no file of at most"):
        read_training_arguments(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "training_args.bin")  # which to open would wait for ever
    for path in (tmp_path / "training_args.bin", tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_training_arguments(path)


def test_every_place_where_a_file_can_be_cut_off(tmp_path):
    buffer = io.BytesIO()
    torch.save(Arguments(beta=0.04), buffer)
    whole, path = buffer.getvalue(), tmp_path / "training_args.bin"
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_training_arguments(path)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_were_changed_are_read_or_refused(seed):
    """Nothing but a value or a PickleError, whatever the bytes."""
    import random

    draw = random.Random(seed)
    original = pickle.dumps(Arguments(**PLAIN), draw.choice(PROTOCOLS))
    for _ in range(300):
        changed = bytearray(original)
        for _ in range(draw.randint(1, 5)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        with suppress(PickleError):
            plain(read_pickle(bytes(changed)))
