"""Writers of a store that fail, die or race leave nothing half done."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from store_fixtures import DRAW, FAILS, FILLS, quarantined, visible

import entropy_core
from entropy_core.errors import StoreError
from entropy_core.store import manifest
from entropy_core.store.store import Stage, Store


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
    with pytest.raises(StoreError, match=r"cannot be written.*No space left.*Fix: make room"):
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


def test_all_of_an_artifact_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(store, monkeypatch):
    """What the loss of power would show, which kills of a process do not."""
    synced, renamed = [], os.rename

    def rename(old, new):
        ours = [path.stat().st_ino for path in [Path(old), *Path(old).rglob("*")]]
        assert len(ours) == 5 and set(ours) <= set(synced)  # of three files, one in a folder
        synced.clear()
        renamed(old, new)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", rename)
    made = store.run(DRAW, None, {"seed": 1})
    assert sorted(synced) == sorted([made.directory.parent.stat().st_ino, store.root.stat().st_ino])


def test_the_disk_is_asked_for_many_files_at_a_time(tmp_path, monkeypatch):
    """Each has to wait for the disk: for one after the other of 20,000, that is minutes."""
    paths, together, waiting = [tmp_path / str(number) for number in range(16)], threading.Barrier(8), threading.Event()
    for path in paths:
        path.touch()

    def sync(_: int) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(20 if not waiting.is_set() else 0)
            waiting.set()

    monkeypatch.setattr(os, "fsync", sync)
    manifest.bring_to_disk(paths)
    assert waiting.is_set()


def test_a_root_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file").run(DRAW, None, {"seed": 1})


STAGES = """
    import os, sys, time
    from entropy_core.store.store import Stage, Store

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
