"""What was damaged is set aside or reported, and never used; a store that cannot be written is still read."""

import errno
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_fixtures import CONSTANT, DRAW, EXECUTED, flip_a_byte, quarantined

from entropy_core.errors import StoreError, UnsoundError
from entropy_core.files import digests as file_digests
from entropy_core.files.digests import file_digest
from entropy_core.pipeline.repairs import with_repairs
from entropy_core.store import pruning
from entropy_core.store.artifact import Artifact
from entropy_core.store.manifest import MANIFEST, check_manifest
from entropy_core.store.signature import VARIABLE, SignatureError
from entropy_core.store.store import Store

FILES = ("numbers.json", "more/text.txt")


def used(store, seed):
    """What a sweep does: run a stage, open its files, and begin again where something is damaged."""

    def work():
        made = store.run(DRAW, None, {"seed": seed})
        return made, [made.path(name).read_text() for name in FILES]

    return with_repairs(store, work)


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
    again, texts = used(store, 1)
    assert again == made and len(EXECUTED) == 2
    assert json.loads(texts[0]) == [0, 1, 2] and texts[1] == "seed 1"
    assert len(quarantined(store)) == 1 and quarantined(store)[0].startswith(f"draw-{made.key}-")
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"draw/{made.key} is unsound" in warning.message


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_never_read(store, damage):
    made = store.run(DRAW, None, {"seed": 1})
    damage(made.directory)
    with pytest.raises(StoreError, match=r"draw/.* cannot be used: .*run the sweep again"):
        for name in FILES:
            made.path(name)
    assert quarantined(store) == [], "reading does not write"
    assert store.find("draw", made.key) is None
    assert len(quarantined(store)) == 1
    assert store.find("draw", made.key) is None and len(quarantined(store)) == 1


@pytest.fixture
def elsewhere(tmp_path) -> Iterator[Path]:
    """A folder on another disk."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk only")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_damage_is_set_aside_where_a_stage_is_on_another_disk(store, elsewhere, caplog):
    store.root.mkdir()
    (store.root / "draw").symlink_to(elsewhere)
    made = store.run(DRAW, None, {"seed": 1})
    flip_a_byte(made.directory)
    assert used(store, 1)[0] == made and len(EXECUTED) == 2
    [aside] = [path for path in elsewhere.iterdir() if path.name != made.key]
    assert aside.name.startswith(f".quarantine-draw-{made.key}-") and aside.name in caplog.text
    assert store.names() == [("draw", made.key)]
    assert aside.name in [waste.path.name for waste in pruning.waste(store)]


@pytest.mark.parametrize("key", ["", "a key"])
def test_no_byte_of_a_manifest_changes_unnoticed(store, monkeypatch, key):
    """Also where what it says stays the same, and where its seal is at another place."""
    monkeypatch.setenv(VARIABLE, key)
    made = store.run(DRAW, None, {"seed": 1})
    path = made.directory / MANIFEST
    content = path.read_bytes()

    def fault() -> str:
        try:
            return check_manifest(made.directory, made.stage, made.key)[1]
        except SignatureError as error:
            return error.fact

    assert not fault()
    for at in range(0, len(content), len(content) // 100):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert fault(), content[at - 20 : at + 20]
    lines = content.splitlines(keepends=True)
    (seal,) = (number for number, line in enumerate(lines) if line.startswith(b' "seal"'))
    lines[seal - 1 : seal + 1] = lines[seal], lines[seal - 1]
    path.write_bytes(b"".join(lines))
    assert json.loads(path.read_bytes()) == json.loads(content) and fault()


def test_swapped_files_and_swapped_artifacts_are_found_out(store):
    one, two = (store.run(DRAW, None, {"seed": seed}) for seed in (1, 2))
    swap(one.path("more/text.txt"), two.path("more/text.txt"))
    for artifact in (one, two):
        with pytest.raises(UnsoundError, match=r"text\.txt was altered"):
            artifact.path("more/text.txt")
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


def test_finding_reads_no_data_file(store, monkeypatch):
    made = store.run(DRAW, None, {"seed": 1})
    for name in FILES:
        flip = bytearray(made.path(name).read_bytes())
        flip[0] ^= 1
        made.path(name).write_bytes(flip)
    monkeypatch.setattr(file_digests.hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))
    assert Store(store.root).find("draw", made.key) == store.run(DRAW, None, {"seed": 1}) == next(store.ls()) == made


def test_all_of_an_artifact_is_looked_at_when_asked_for(store):
    made = store.run(DRAW, None, {"seed": 1})
    assert store.check("draw", made.key, file_digest) == (made, "")
    flip_a_byte(made.directory)
    assert store.check("draw", made.key) == (made, "")
    assert store.check("draw", made.key, file_digest) == (None, "text.txt was altered: its SHA-256 is another")
    assert store.check("draw", made.key)[0] is None, "and is known from then on"


def test_what_is_damaged_twice_ends_the_work(store):
    def work():
        made = store.run(DRAW, None, {"seed": 1})
        flip_a_byte(made.directory)
        made.path("more/text.txt")

    with pytest.raises(UnsoundError, match="run the sweep again"):
        with_repairs(store, work)
    assert len(EXECUTED) == 2 and len(quarantined(store)) == 1


def test_an_unreadable_file_is_not_condemned(store, monkeypatch):
    made = store.run(DRAW, None, {"seed": 1})

    def refuse(*_):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(file_digests.hashlib, "file_digest", refuse)
    with pytest.raises(PermissionError):
        made.path("numbers.json")
    with pytest.raises(PermissionError):
        store.find("draw", made.key, file_digest)
    assert quarantined(store) == []


def test_an_unchanged_file_is_hashed_once(store, monkeypatch):
    hashed = []
    real = file_digests.hashlib.file_digest

    def count(file, name):
        hashed.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", count)
    monkeypatch.setattr(file_digests, "SETTLED_NS", 0)
    made = store.run(DRAW, None, {"seed": 1})
    for _ in range(3):
        found = Store(store.root).run(DRAW, None, {"seed": 1})
        assert [found.path(name).name for name in FILES] == sorted(hashed)
    before = made.path("more/text.txt").stat()
    time.sleep(0.02)  # the clock of the file system ticks
    flip_a_byte(made.directory)
    os.utime(made.directory / "more/text.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UnsoundError, match="was altered"):
        made.path("more/text.txt")
    assert store.find("draw", made.key) is None, "an altered file with its old size and time is found out too"


def test_a_file_too_young_for_the_clock_is_hashed_again(store, monkeypatch):
    monkeypatch.setattr(file_digests, "SETTLED_NS", 60_000_000_000)
    made = store.run(DRAW, None, {"seed": 1})
    stat = made.path("more/text.txt").stat()
    clock = time.time_ns()  # that stands still
    monkeypatch.setattr(file_digests, "identity_of", lambda _: (stat.st_dev, stat.st_ino, stat.st_size, clock, clock))
    made.path("more/text.txt")
    flip_a_byte(made.directory)
    with pytest.raises(UnsoundError, match="was altered"):
        made.path("more/text.txt")


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
    with pytest.raises(UnsoundError, match="was altered"):
        made.path("more/text.txt")
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
