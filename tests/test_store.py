"""The store: reuse, keys, verification, writers that fail, die or race, and stores that cannot be written."""

import errno
import importlib
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pydantic
import pytest

import entropy_core
from entropy_core import manifest as manifest_module
from entropy_core.artifact import Artifact, Writer
from entropy_core.errors import StoreError
from entropy_core.store import Stage, Store

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


@pytest.fixture(autouse=True)
def _reset():
    EXECUTED.clear()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def visible(store):
    """Everything under the root but locks and quarantine."""
    paths = (path.relative_to(store.root) for path in store.root.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] not in (".locks", ".quarantine")}


def quarantined(store):
    folder = store.root / ".quarantine"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- reuse


def test_second_run_reuses(store, caplog):
    caplog.set_level(logging.DEBUG, "entropy_probe.store")
    first = store.run(DRAW, None, {"seed": 1})
    second = store.run(DRAW, None, {"seed": 1})
    assert first == second and hash(first) == hash(second)
    assert len(EXECUTED) == 1
    assert second.json("numbers.json") == [0, 1, 2]
    assert second.path("more/text.txt").read_text() == "seed 1"
    assert second.summary == {"n": 3, "mean": 0.1}
    assert first.directory == store.root / "draw" / first.key
    assert [(record.levelname, record.message.split(" in ")[0]) for record in caplog.records] == [
        ("INFO", f"draw {first.key[:12]}: computed"),
        ("DEBUG", f"draw {first.key[:12]}: reused"),
    ]


def test_another_store_object_finds_it(store):
    made = store.run(DRAW, None, {"seed": 1})
    again = Store(str(store.root))
    assert again.find("draw", made.key) == made == again.run(DRAW, None, {"seed": 1})
    assert list(again.ls()) == [made]
    assert again.find("draw", "0" * 32) is None and again.find("other", made.key) is None
    assert len(EXECUTED) == 1


def test_a_moved_store_is_still_valid(store, tmp_path):
    made = store.run(DRAW, None, {"seed": 1})
    summed = store.run(TOTAL, None, {"numbers": made})
    store.root.rename(tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere")
    found = moved.run(DRAW, None, {"seed": 1})
    assert found == made and found.path("numbers.json").is_relative_to(moved.root)
    assert moved.run(TOTAL, None, {"numbers": found}) == summed
    assert len(EXECUTED) == 2


def test_a_reference_survives_json_and_pickle(store):
    made = store.run(DRAW, None, {"seed": 1})
    reference = json.loads(json.dumps(made.to_dict()))
    assert set(reference) == {"stage", "key", "digest"}
    assert Artifact.from_dict(reference, store.root).json("numbers.json") == [0, 1, 2]
    assert pickle.loads(pickle.dumps(made)).summary == made.summary


def test_ls_is_sorted_and_skips_what_is_not_complete(store, caplog):
    made = [store.run(stage, None, {"seed": seed}) for stage in (CONSTANT, DRAW) for seed in range(3)]
    (store.root / "draw" / ".tmp-x").mkdir()
    (store.root / "draw" / "unfinished").mkdir()
    (made[0].directory / "manifest.json").write_text("{}")
    assert list(store.ls()) == sorted(made[1:], key=lambda artifact: (artifact.stage, artifact.key))
    assert "unsound" in caplog.text


def test_finding_does_not_make_the_root(store):
    assert store.find("draw", "0" * 32) is None and list(store.ls()) == []
    assert not store.root.exists()


# ---- keys


def test_every_input_is_in_the_key(store):
    inputs = {
        "n": 3,
        "rate": 0.1,
        "name": "a",
        "none": None,
        "list": [1, [2]],
        "dict": {"a": {"b": 1}},
        "model": Settings(),
    }
    changes: list[dict] = [
        {},
        {"n": 4},
        {"rate": math.nextafter(0.1, 1)},
        {"name": "A"},
        {"none": False},
        {"list": [1, 2]},
        {"list": [[2], 1]},
        {"dict": {"a": {"b": 2}}},
        {"dict": {"a": {"c": 1}}},
        {"model": Settings(size=3)},
        {"model": Settings(rate=0.25)},
        {"extra": 0},
    ]
    keys = [store.key(DRAW, inputs | change) for change in changes]
    assert len(set(keys)) == len(changes)
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in keys)


def test_alike_but_different_values_differ(store):
    values = [1, 1.0, True, "1", "1.0", [1], {"a": 1}, None, "", [], {}, 0.0, -0.0]
    assert len({store.key(DRAW, {"n": value}) for value in values}) == len(values)


def test_order_and_container_do_not_count(store):
    assert store.key(DRAW, {"a": 1, "b": (1, 2)}) == store.key(DRAW, {"b": [1, 2], "a": 1})
    assert store.key(DRAW, {"model": Settings()}) == store.key(
        DRAW, {"model": {"size": 2, "rate": 0.5, "device": None}}
    )


def test_stage_name_and_code_are_in_the_key(store):
    renamed, other_code = Stage("draw-again", draw), Stage("draw", constant)
    assert len({store.key(stage, {"seed": 1}) for stage in (DRAW, renamed, other_code)}) == 3


def test_execution_is_recorded_but_not_in_the_key(store):
    class Execution:
        def describe(self):
            return {"device": "cpu"}

    made = store.run(DRAW, Execution(), {"seed": 1})
    assert store.run(DRAW, object(), {"seed": 1}) == made
    assert len(EXECUTED) == 1
    assert made.manifest["execution"] == {"device": "cpu"}


def test_the_key_takes_the_content_of_an_artifact_and_not_its_key(store):
    one, other = (store.run(CONSTANT, None, {"seed": seed}) for seed in (1, 2))
    assert one.key != other.key and one.digest == other.digest
    assert store.key(TOTAL, {"numbers": one}) == store.key(TOTAL, {"numbers": other})
    three, four = (store.run(DRAW, None, {"n": n}) for n in (3, 4))
    assert store.key(TOTAL, {"numbers": three}) != store.key(TOTAL, {"numbers": four})
    assert store.key(TOTAL, {"numbers": [three, four]}) != store.key(TOTAL, {"numbers": [four, three]})


def test_the_summary_is_part_of_the_content():
    files = {"a": {"sha256": "0" * 64, "bytes": 1}}
    assert manifest_module.content_digest(files, {"n": 1}) != manifest_module.content_digest(files, {"n": 2})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Path("a"), "inputs.x"),
        ({"device": object()}, "inputs.x.device"),
        ([1, {"deep": {1, 2}}], "inputs.x.1.deep"),
        (math.nan, "inputs.x"),
        ((0.0, math.inf), "inputs.x.1"),
        (b"bytes", "inputs.x"),
        ({1: "one"}, "inputs.x"),
        ({"float": "1.0"}, "inputs.x"),
        ({"artifact": "draw", "digest": "0"}, "inputs.x"),
        (Settings(device=Path("a")), "inputs.x.device"),
        (Settings(device={"a": {1}}), "inputs.x.device.a"),
        (Settings(rate=math.nan), "inputs.x.rate"),
        (DRAW, "inputs.x"),
    ],
)
def test_an_input_without_an_exact_form_is_refused_by_name(store, value, where):
    with pytest.raises(StoreError) as caught:
        store.run(DRAW, None, {"x": value})
    assert caught.value.fact.startswith(f"{where} = ")
    assert EXECUTED == []


def test_a_tensor_is_refused(store):
    import torch

    with pytest.raises(StoreError, match=r"inputs\.x\.device = .* \(device\)"):
        store.key(DRAW, {"x": {"device": torch.device("cpu")}})
    with pytest.raises(StoreError, match=r"inputs\.x = .* \(Tensor\)"):
        store.key(DRAW, {"x": torch.zeros(2)})


@pytest.mark.parametrize("name", ["", "Draw", "a/b", "..", ".tmp", "a_b", "a--b"])
def test_a_stage_name_must_be_able_to_name_a_directory(name):
    with pytest.raises(StoreError, match="cannot name a stage"):
        Stage(name, draw)


# ---- files and manifest


def test_files_come_back_and_have_the_same_bytes_every_time(tmp_path):
    torch = pytest.importorskip("torch")
    stage = Stage("everything", writes_everything)
    made, again = (Store(tmp_path / name).run(stage, None, {"values": [0.5, -1.5]}) for name in ("one", "two"))
    assert made.digest == again.digest
    tensors = made.tensors()
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        "x": (torch.float32, (2,)),
        "same": (torch.float32, (2,)),
        "column": (torch.float32, (1, 2)),
        "half": (torch.bfloat16, (2,)),
    }
    assert torch.equal(tensors["x"], torch.tensor([0.5, -1.5]))
    assert made.tensors("empty.safetensors") == {}
    assert made.table("rows.parquet").to_pylist()[1] == {"sequence_id": 1, "reward": None}
    assert made.json("notes.json") == {"a": [None, "η"], "b": 1}

    from safetensors import safe_open

    with safe_open(made.path("tensors.safetensors"), "pt") as file:
        assert file.metadata()["h"] == "h of «τ»\n"
    assert made.path("tensors.safetensors").stat().st_mode == made.path("notes.json").stat().st_mode


def test_the_manifest_says_what_made_it(store):
    upstream = store.run(DRAW, None, {"seed": 1})
    made = store.run(TOTAL, None, {"numbers": upstream})
    manifest = json.loads((made.directory / "manifest.json").read_text())
    assert manifest == made.manifest
    assert (manifest["stage"], manifest["key"], manifest["digest"]) == ("total", made.key, made.digest)
    assert manifest["inputs"] == {"numbers": {"artifact": "draw", "digest": upstream.digest}}
    assert manifest["upstream"] == [upstream.to_dict()]
    assert "entropy_core.store" in manifest["modules"] and len(manifest["code"]) == 64
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "pyarrow", "safetensors"} <= set(manifest["versions"])
    assert manifest["wall_seconds"] >= 0 and manifest["peak_rss_bytes"] > 2**20
    assert manifest["created"].endswith("+00:00")
    assert upstream.manifest["files"]["more/text.txt"]["bytes"] == len("seed 1")


def test_the_manifest_describes_tensors_and_tables(store):
    files = store.run(Stage("everything", writes_everything), None, {"values": [1.0]}).manifest["files"]
    assert files["tensors.safetensors"]["tensors"]["column"] == {"dtype": "F32", "shape": [1, 1]}
    assert files["tensors.safetensors"]["tensors"]["half"] == {"dtype": "BF16", "shape": [1]}
    assert files["rows.parquet"]["num_rows"] == 2
    assert files["rows.parquet"]["schema"] == "sequence_id: int64\nreward: double"
    assert "tensors" not in files["notes.json"]


def test_a_file_that_is_not_there_is_named(store):
    with pytest.raises(StoreError, match=r"draw/.* no file other\.json.*run the sweep again"):
        store.run(DRAW, None, {"seed": 1}).path("other.json")


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../x", "/x", "manifest.json", "./manifest.json"])
def test_a_data_file_stays_inside_the_artifact(tmp_path, name):
    with pytest.raises(StoreError, match="cannot name a data file"):
        Writer(tmp_path).path(name)


@pytest.mark.parametrize("what", ["list", "nan", "object"])
def test_a_summary_must_be_a_json_dict(store, what):
    with pytest.raises(StoreError, match="the summary of stage returns is"):
        store.run(RETURNS, None, {"what": what})
    assert visible(store) == set()


def test_a_summary_is_what_will_be_read_back(store):
    made = store.run(RETURNS, None, {"what": "keys"})
    assert made.summary == {"9": {"b": [1, 2]}, "10": 1}
    assert store.find("returns", made.key) == made


# ---- damage


def flip_a_byte(directory):
    path = directory / "more" / "text.txt"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def edit_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "byte flipped": flip_a_byte,
    "truncated": lambda d: os.truncate(d / "numbers.json", 1),
    "emptied": lambda d: (d / "numbers.json").write_bytes(b""),
    "grown": lambda d: (d / "numbers.json").write_text((d / "numbers.json").read_text() + " "),
    "deleted": lambda d: (d / "numbers.json").unlink(),
    "manifest deleted": lambda d: (d / "manifest.json").unlink(),
    "manifest cut": lambda d: os.truncate(d / "manifest.json", 50),
    "manifest not a dict": lambda d: (d / "manifest.json").write_text("[]"),
    "manifest empty": lambda d: (d / "manifest.json").write_text("{}"),
    "summary edited": lambda d: edit_manifest(d, lambda m: m["summary"].update(mean=0.2)),
    "summary nan": lambda d: edit_manifest(d, lambda m: m["summary"].update(mean=math.nan)),
    "inputs edited": lambda d: edit_manifest(d, lambda m: m["inputs"].update(seed=7)),
    "code edited": lambda d: edit_manifest(d, lambda m: m.update(code="0" * 64)),
    "digest edited": lambda d: edit_manifest(d, lambda m: m.update(digest="0" * 64)),
    "file dropped": lambda d: edit_manifest(d, lambda m: m["files"].pop("numbers.json")),
    "files malformed": lambda d: edit_manifest(d, lambda m: m.update(files=["numbers.json"])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_set_aside_and_computed_anew(store, caplog, damage):
    made = store.run(DRAW, None, {"seed": 1})
    damage(made.directory)
    again = store.run(DRAW, None, {"seed": 1})
    assert again == made and len(EXECUTED) == 2
    assert again.json("numbers.json") == [0, 1, 2] and again.path("more/text.txt").read_text() == "seed 1"
    assert len(quarantined(store)) == 1 and quarantined(store)[0].startswith(f"draw-{made.key}-")
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"draw/{made.key} is unsound" in warning.message


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_never_read(store, damage):
    made = store.run(DRAW, None, {"seed": 1})
    damage(made.directory)
    with pytest.raises(StoreError, match=r"draw/.* cannot be used: .*run the sweep again"):
        for name in ("numbers.json", "more/text.txt"):
            made.path(name)
    assert quarantined(store) == [], "reading does not write"
    assert store.find("draw", made.key) is None
    assert len(quarantined(store)) == 1
    assert store.find("draw", made.key) is None and len(quarantined(store)) == 1


def test_swapped_files_and_swapped_artifacts_are_found_out(store):
    one, two = (store.run(DRAW, None, {"seed": seed}) for seed in (1, 2))
    swap(one.path("more/text.txt"), two.path("more/text.txt"))
    assert store.find("draw", one.key) is None and store.find("draw", two.key) is None
    one, two = (store.run(DRAW, None, {"seed": seed}) for seed in (1, 2))
    swap(one.directory, two.directory)
    assert store.find("draw", one.key) is None and store.find("draw", two.key) is None
    assert len(quarantined(store)) == 4
    same, name = (store.run(CONSTANT, None, {"seed": seed}) for seed in (1, 2))
    swap(same.directory / "manifest.json", name.directory / "manifest.json")  # equal content, and still not its own
    assert store.find("constant", same.key) is None


def swap(a, b):
    third = a.with_name("third")
    a.rename(third)
    b.rename(a)
    third.rename(b)


def test_an_artifact_that_was_replaced_is_not_taken_for_the_old_one(store):
    made = store.run(DRAW, None, {"seed": 1})
    old = Artifact("draw", made.key, "0" * 64, store.root)
    with pytest.raises(StoreError, match="other content under this key"):
        old.path("numbers.json")


def test_an_unreadable_file_is_not_condemned(store, monkeypatch):
    made = store.run(DRAW, None, {"seed": 1})

    def refuse(path):
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(manifest_module, "_hash_file", refuse)
    with pytest.raises(PermissionError):
        store.find("draw", made.key)
    assert quarantined(store) == []


def test_an_unchanged_file_is_hashed_once(store, monkeypatch):
    hashed = []
    real = manifest_module._hash_file

    def count(path):
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest_module, "_hash_file", count)
    monkeypatch.setattr(manifest_module, "_SETTLED_NS", 0)
    made = store.run(DRAW, None, {"seed": 1})
    for _ in range(3):
        Store(store.root).run(DRAW, None, {"seed": 1}).json("numbers.json")
    assert sorted(hashed) == ["numbers.json", "text.txt"]
    before = made.path("more/text.txt").stat()
    time.sleep(0.02)  # the clock of the file system ticks
    flip_a_byte(made.directory)
    os.utime(made.directory / "more/text.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.find("draw", made.key) is None, "an altered file with its old size and time is found out too"


def test_a_file_too_young_for_the_clock_is_hashed_again(store, monkeypatch):
    monkeypatch.setattr(manifest_module, "_SETTLED_NS", 60_000_000_000)
    made = store.run(DRAW, None, {"seed": 1})
    path = made.path("more/text.txt")
    stat = path.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: stat if self == path else os.stat(self))  # a clock that stands
    flip_a_byte(made.directory)
    assert store.find("draw", made.key) is None


# ---- writers that fail, die or race


@pytest.mark.parametrize(("error", "kind"), [("value", ValueError), ("interrupt", KeyboardInterrupt)])
def test_an_exception_leaves_nothing(store, error, kind):
    for _ in range(2):  # and frees the lock
        with pytest.raises(kind):
            store.run(FAILS, None, {"error": error})
    assert list((store.root / "fails").iterdir()) == []


@pytest.mark.parametrize("how", ["device", "safetensors"])
def test_a_full_disk_is_explained_and_leaves_nothing(store, how):
    if how == "device" and not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    with pytest.raises(StoreError, match=r"cannot be written.*No space left.*Way out: make room"):
        store.run(FILLS, None, {"how": how})
    assert list((store.root / "fills").iterdir()) == []


def test_a_failing_commit_leaves_nothing(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="cannot be written"):
        patch.setattr(os, "fsync", full)
        store.run(DRAW, None, {"seed": 1})
    assert list((store.root / "draw").iterdir()) == []
    assert store.run(DRAW, None, {"seed": 1}).summary["n"] == 3


def test_a_root_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file").run(DRAW, None, {"seed": 1})


STAGES = """
    import os, sys, time
    from entropy_core.store import Stage, Store

    def slow(out, seconds, n):  # the seconds are its execution
        out.json([n], "half.json")
        with open(os.environ["LOG"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(seconds)
        out.json([n], "rest.json")
        return {}

    SLOW = Stage("slow", slow)

    if sys.argv[0] == "-c" and len(sys.argv) == 3:
        print(Store(sys.argv[1]).run(SLOW, float(sys.argv[2]), {"n": 1}).digest)
"""


class Processes:
    """Python processes that run one stage in one store and log each execution."""

    def __init__(self, folder, module):
        self.folder, self.module = folder, module
        self.started = []

    @property
    def stage(self):
        return importlib.import_module(self.module).SLOW

    def start(self, seconds):
        command = [sys.executable, "-c", f"import {self.module}", self.folder / "store", str(seconds)]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return self.started[-1]

    def executions(self):
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def processes(tmp_path, monkeypatch):
    module = f"stages_of_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(STAGES))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(entropy_core.__file__).parents[1])]))
    processes = Processes(tmp_path, module)
    yield processes
    for process in processes.started:
        process.kill()
        process.communicate()
    sys.modules.pop(module, None)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_writer_leaves_nothing_visible_and_frees_its_lock(store, processes):
    key = store.key(processes.stage, {"n": 1})
    victim = processes.start(seconds=600)
    wait_until(processes.executions)
    [temporary] = (store.root / "slow").iterdir()
    assert temporary.name.startswith(f".tmp-{key}-") and (temporary / "half.json").exists()
    assert store.find("slow", key) is None
    victim.send_signal(signal.SIGKILL)
    assert victim.wait(10) == -signal.SIGKILL
    assert store.find("slow", key) is None and list(store.ls()) == []
    made = store.run(processes.stage, 0, {"n": 1})
    assert made.key == key and made.json("rest.json") == [1]
    assert [path.name for path in (store.root / "slow").iterdir()] == [key], "what the victim left is gone"


def test_of_eight_racing_processes_one_computes(store, processes):
    racers = [processes.start(seconds=1) for _ in range(8)]
    digests = {racer.communicate(timeout=120)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 8
    assert len(digests) == 1 and len(processes.executions()) == 1
    assert [artifact.digest for artifact in store.ls()] == [digest.strip() for digest in digests]


def test_looking_does_not_wait_for_a_writer_nor_disturb_it(store, processes, caplog):
    made = store.run(processes.stage, 0, {"n": 1})
    (made.directory / "rest.json").unlink()
    lock = store.lock("slow", made.key)
    with lock:
        assert store.find("slow", made.key) is None
    assert "left where it is" in caplog.text and quarantined(store) == []


def test_code_that_changed_before_it_was_loaded_makes_no_result(store, tmp_path, monkeypatch):
    package = tmp_path / f"late_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("VALUE = 1\n")
    (package / "stage.py").write_text(
        "def stage(out, edit):\n    edit()\n    from .helper import VALUE\n    return {'value': VALUE}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stage = Stage("late", importlib.import_module(f"{package.name}.stage").stage)
    with pytest.raises(StoreError, match="code of stage late changed"):
        store.run(stage, lambda: (package / "helper.py").write_text("VALUE = 1000\n"), {})
    assert visible(store) == set()
    assert store.run(stage, lambda: None, {}).summary == {"value": 1000}


# ---- stores that cannot be written


@pytest.fixture
def read_only(monkeypatch):
    """Make every call that would change the file system fail, as on read-only media; for root too."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opens(path, flags, *args, real=os.open, **kwargs):
        return refuse(path) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else real(path, flags, *args, **kwargs)

    def make():
        for name in ("mkdir", "rename", "unlink", "rmdir", "chmod"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "open", opens)

    return make


def test_a_read_only_store_serves_for_analysis(store, read_only):
    made = store.run(DRAW, None, {"seed": 1})
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    read_only()
    again = Store(store.root)
    assert again.find("draw", made.key) == again.run(DRAW, None, {"seed": 1}) == next(again.ls()) == made
    assert made.json("numbers.json") == [0, 1, 2] and made.summary["n"] == 3
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_damage_in_a_read_only_store_is_reported_and_not_used(store, read_only, caplog):
    made = store.run(DRAW, None, {"seed": 1})
    flip_a_byte(made.directory)
    read_only()
    assert store.find("draw", made.key) is None
    assert "text.txt was altered" in caplog.text and "left where it is" in caplog.text
    with pytest.raises(StoreError, match="cannot be written"):
        store.run(DRAW, None, {"seed": 1})
    assert made.directory.exists() and len(EXECUTED) == 1


def test_computing_into_a_read_only_store_is_explained(store, read_only):
    store.run(DRAW, None, {"seed": 1})
    read_only()
    with pytest.raises(StoreError, match=r"cannot be written.*Read-only file system.*choose another store"):
        store.run(DRAW, None, {"seed": 2})
    assert len(EXECUTED) == 1
