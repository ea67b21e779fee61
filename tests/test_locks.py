"""Locks of a store: who waits is told for whom, and nothing is deleted where it cannot be told that nobody uses it."""

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_fixtures import DRAW

from entropy_core.errors import StoreError
from entropy_core.store import locks
from entropy_core.store.store import Store
from flows.cli import main

KEY = "0" * 32


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def users(store: Store) -> list[Path]:
    return sorted((store.root / ".locks" / "users").iterdir())


def test_who_waits_says_for_whom_and_since_when(store, caplog, monkeypatch):
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_LINES", 0.3)
    caplog.set_level(logging.WARNING, "entropy_probe.store")  # as `--direct` shows them
    key = store.key(DRAW, {"seed": 1})
    with ThreadPoolExecutor(1) as pool, store.lock("draw", key):
        waiting = pool.submit(store.run, DRAW, None, {"seed": 1})
        deadline = time.monotonic() + 30
        while caplog.text.count("waits for") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert waiting.result(timeout=30).key == key
    said = f"waits for draw {key[:12]}, which is being computed by process {os.getpid()} of this machine since 20"
    assert caplog.text.count(said) >= 2


def test_a_wait_has_an_end(store, monkeypatch):
    monkeypatch.setattr(locks, "_MOST_SECONDS", 0.2)
    said = rf"draw/{KEY} is still being worked on by process {os.getpid()} of this machine since 20.*end it"
    with store.lock("draw", KEY), pytest.raises(locks.HeldError, match=said), store.lock("draw", KEY):
        pytest.fail("it was held twice")


def test_a_lock_that_is_not_waited_for_says_who_holds_it(store):
    said = pytest.raises(locks.HeldError, match=f"by process {os.getpid()} of this machine")
    with store.lock("draw", KEY), said, store.lock("draw", KEY, wait=False):
        pytest.fail("it was held twice")
    with store.lock("draw", KEY, wait=False):
        pass


def test_the_lock_of_a_dead_process_is_free(store):
    program = (
        f"import os, sys\nfrom entropy_core.store.store import Store\nwith Store(sys.argv[1]).lock('draw', '{KEY}'):\n"
    )
    command = [sys.executable, "-c", program + "    os._exit(1)", str(store.root)]
    subprocess.run(command, cwd=Path(__file__).parents[1])
    with store.lock("draw", KEY, wait=False):
        pass


@pytest.mark.attack("everything is pruned where locks do not work")
def test_without_locks_nothing_is_computed_and_nothing_deleted(store, capsys, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"cannot be locked: No locks available.*have the store on one"):
        store.run(DRAW, None, {"seed": 1})
    assert not list(store.root.glob("draw/*"))
    (store.root / "draw" / ".tmp-of-a-live-sweep").mkdir(parents=True)
    assert main(["store", "prune", "--yes", "--artifacts", str(store.root)]) == 2
    assert "cannot be locked" in capsys.readouterr().err
    assert list(store.root.glob("draw/*"))


def test_without_locks_what_is_there_is_used(store, monkeypatch):
    made = store.run(DRAW, None, {"seed": 1})
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with store.in_use():
        assert store.run(DRAW, None, {"seed": 1}) == made


@pytest.mark.attack("everything is pruned while a sweep is under way on another machine")
def test_a_sweep_on_another_machine_is_not_disturbed(store, capsys):
    """Whose lock is not seen here."""
    unneeded = store.run(DRAW, None, {"seed": 1}).directory
    with store.in_use():
        [mine] = users(store)
        theirs = json.loads(mine.read_bytes()) | {"host": "node-7"}
    assert users(store) == []
    file = store.root / ".locks" / "users" / "node-7"
    file.write_text(json.dumps(theirs))
    assert main(["store", "prune", "--yes", "--artifacts", str(store.root)]) == 2
    said = capsys.readouterr().err
    assert f"process {os.getpid()} of node-7 since 20" in said and f"delete {file}" in said
    assert unneeded.exists()
    file.unlink()
    assert main(["store", "prune", "--yes", "--artifacts", str(store.root)]) == 0
    assert not unneeded.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"host": "x"}'])
def test_a_user_that_cannot_be_understood_is_left_alone(store, capsys, content):
    folder = store.root / ".locks" / "users"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(content)
    assert main(["store", "prune", "--yes", "--artifacts", str(store.root)]) == 2
    assert "another process" in capsys.readouterr().err


def test_a_process_of_this_machine_that_has_died_uses_nothing(store):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    folder = store.root / ".locks" / "users"
    folder.mkdir(parents=True)
    dead = {"host": platform.node(), "pid": child.pid, "since": "2026-01-01T00:00:00+00:00"}
    (folder / "x").write_text(json.dumps(dead))
    with store.in_use(alone=True):
        assert users(store) == []


def test_a_live_process_uses_what_it_says_even_if_its_lock_is_not_seen(store):
    folder = store.root / ".locks" / "users"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(locks._me())
    with pytest.raises(locks.HeldError, match="it has not said that it has ended"), store.in_use(alone=True):
        pytest.fail("the store was ours")


def test_a_folder_of_locks_that_cannot_be_written_is_explained(store, monkeypatch):
    store.run(DRAW, None, {"seed": 1})
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_CREAT and str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with store.lock("draw", store.key(DRAW, {"seed": 1})):
        pass  # it is there, and can be locked though it cannot be written
    with pytest.raises(StoreError, match=r"cannot be written: .*Permission denied"):
        store.run(DRAW, None, {"seed": 2})


def test_an_error_inside_passes_through(store):
    for held in (store.lock("draw", KEY), store.in_use(), store.in_use(alone=True)):
        with pytest.raises(OSError, match="something else"), held:
            raise OSError("something else")
