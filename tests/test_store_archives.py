"""`entropy-probe store export` and `import`: a run goes to another machine, and a false archive does not come in."""

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from pipeline_fixtures import Counting, Probe, probe
from store_command_fixtures import flip, kept, settings

from entropy_core.config.schema import VarianceRequest
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.store import runs
from entropy_core.store.store import Store
from flows.cli import main

pytest_plugins = ["store_command_fixtures"]


@pytest.fixture(scope="module")
def home(two_runs) -> Path:
    return two_runs.home


@pytest.fixture(scope="module")
def first(two_runs) -> Probe:
    return two_runs.first


@pytest.fixture(scope="module")
def second(two_runs) -> Probe:
    return two_runs.second


@pytest.fixture
def away(home, tmp_path) -> Path:
    """A copy, to change."""
    return shutil.copytree(home, tmp_path / "away")


@pytest.fixture
def store(store_command):
    return store_command


@pytest.fixture(scope="module")
def archive(home, first, second, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "run.tar"
    command = ["store", "export", first.result.run_id, str(file), "--artifacts", str(home / "artifacts")]
    assert main(command) == 0
    return file


def test_an_exported_run_serves_for_its_statistics_elsewhere(archive, first, tmp_path, store):
    root = tmp_path / "other machine"
    status, said = store(root, "import", archive)
    assert status == 0 and first.result.run_id in said and "all verified" in said
    stages = {stage for stage, _ in Store(root).names()}
    assert not stages & {"sample-e-batch", "load-checkpoint", "load-prompts", "entropy-gradient"}
    assert store(root, "verify")[0] == 0
    again = Counting(Store(root), Execution())
    same = statistics.variance(VarianceRequest(artifacts=str(root)), Store(root), again)
    assert again.was_computed == {} and same.run_id == first.result.run_id
    other = Counting(Store(root), Execution())
    statistics.variance(VarianceRequest(artifacts=str(root), confidence_level=0.5), Store(root), other)
    assert other.was_computed == {"variance": 1, "report": 1}


def test_with_all_that_it_was_made_from_a_run_goes_on_elsewhere(home, first, second, tmp_path, store):
    root, file = tmp_path / "artifacts", tmp_path / "all.tar"
    assert store(home / "artifacts", "export", first.result.run_id, file, "--all")[0] == 0
    assert store(root, "import", file)[0] == 0
    assert set(Store(root).names()) == {(a.stage, a.key) for _, _, a in first.run.asked}
    moved = settings(home, execution={"artifacts": str(root)})
    assert probe(moved).run.was_computed == {}


def test_the_same_run_makes_the_same_archive(home, archive, first, tmp_path, store):
    assert store(home / "artifacts", "export", first.result.run_id, tmp_path / "again.tar")[0] == 0
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.tar"]


def test_what_cannot_be_exported_is_said(away, first, second, tmp_path, store):
    root = away / "artifacts"
    status, said = store(root, "export", "tiny-0", tmp_path / "x.tar")
    assert status == 2 and f"recorded are {first.result.run_id}" in said
    status, said = store(root, "export", "latest", tmp_path / "nowhere" / "x.tar")
    assert status == 2 and "cannot be written" in said
    damaged = second.run.artifacts("score-e-batch")[0]
    flip(root / damaged.stage / damaged.key / "tokens.safetensors")
    status, said = store(root, "export", second.result.run_id, tmp_path / "x.tar")
    assert status == 2 and f"score-e-batch/{damaged.key}" in said and "was altered" in said
    assert list(tmp_path.glob("*.tar")) == []


def test_what_is_there_stays_and_what_is_damaged_is_replaced(archive, first, tmp_path, store):
    root = tmp_path / "store"
    assert store(root, "import", archive)[0] == 0
    names = Store(root).names()
    damaged, *whole = (root / stage / key / "manifest.json" for stage, key in names)
    identity = {path: path.stat().st_ino for path in whole}
    flip(damaged)
    assert store(root, "import", archive)[0] == 0
    assert {path: path.stat().st_ino for path in whole} == identity
    assert store(root, "verify")[0] == 0
    assert len(list((root / ".quarantine").iterdir())) == 1


def rewritten(archive: Path, target: Path, change) -> Path:
    """The archive with its members changed: `change(name, content)` yields what to write in place of each."""
    with tarfile.open(archive) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file
            for name, content in change(member.name, file.read()):
                if isinstance(content, tarfile.TarInfo):
                    new.addfile(content)
                else:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    new.addfile(info, io.BytesIO(content))
    return target


def also(kind: bytes, name: str, target: str = "/etc/passwd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target

    def change(old: str, content: bytes):
        yield old, content
        if old.endswith("run.json"):
            yield name, member

    return change


def named(name: str):
    def change(old: str, content: bytes):
        yield old, content
        if old.endswith("run.json"):
            yield name, b"x"

    return change


def without(part: str):
    return lambda old, content: [] if part in old else [(old, content)]


def altered(part: str):
    return lambda old, content: [(old, content[:-1] + b"\x00" if old.endswith(part) else content)]


def recording(record: bytes):
    return lambda old, content: [(old, record if old.endswith("run.json") else content)]


KEY = "0" * 32


def sparse(old: str, content: bytes):
    """A file that is one hole, as GNU tar writes it: a megabyte here, and as many as one likes for no more bytes."""
    yield old, content
    if old.endswith("run.json"):
        member = tarfile.TarInfo(f"draw/{KEY}/zeros")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**20)}
        yield member.name, member


EVIL = {
    "a parent folder": (named("../evil"), "no store has"),
    "a parent folder, inside": (named(f"draw/{KEY}/../../../evil"), "no store has"),
    "an absolute path": (named("/tmp/evil"), "no store has"),
    "a hidden folder": (named(".quarantine/evil"), "no store has"),
    "a lock": (named(".locks/in-use"), "no store has"),
    "a file of the root": (named("README.md"), "no store has"),
    "no key": (named("draw/evil/file"), "no store has"),
    "a name too long": (named(f"draw/{KEY}/{'x' * 300}"), "no store has"),
    "a symbolic link": (also(tarfile.SYMTYPE, f"draw/{KEY}/link"), "no store has"),
    "a hard link": (also(tarfile.LNKTYPE, f"draw/{KEY}/link"), "no store has"),
    "a device": (also(tarfile.CHRTYPE, f"draw/{KEY}/device"), "no store has"),
    "a pipe": (also(tarfile.FIFOTYPE, f"draw/{KEY}/pipe"), "no store has"),
    "no manifest": (named(f"draw/{KEY}/file"), "has no manifest"),
    "a file twice": (lambda old, content: [(old, content)] * 2, "two of its members have one name"),
    "a file within a file": (
        lambda old, content: [(old, content), *([(old + "/x", b"x")] if old.endswith("tokens.safetensors") else [])],
        "two of its members have one name",
    ),
    "data altered": (altered("tokens.safetensors"), "was altered"),
    "a manifest altered": (altered("manifest.json"), "manifest was damaged"),
    "data missing": (without("tokens.safetensors"), "tokens.safetensors is missing"),
    "a stage missing": (without("first-order-u/"), "which is neither in it nor in the store"),
    "a file too many": (
        lambda old, content: [(old, content), *([(old + ".x", b"x")] if old.endswith("manifest.json") else [])],
        "files that its manifest does not name",
    ),
    "a record that says nothing": (recording(b'{"finished": "2026-11-26"}'), "does not say what the run needs"),
    "a record of no time": (recording(b'{"finished": 5}'), "does not say what the run needs"),
    "a record without end": (recording(b"[" * 100_000), "does not say what the run needs"),
    "no run": (without("runs/"), "there is no run in it"),
    "a hole that fills a disk": (sparse, "no store has"),
    "many runs": (named("runs/another/run.json"), "it has two runs"),
    "a name that moves the cursor": (named(f"draw/{KEY}/\x1b[2J"), "no store has"),
}


@pytest.mark.attack("a false archive is imported")
@pytest.mark.parametrize("kind", EVIL)
def test_a_false_archive_is_refused_and_leaves_nothing(archive, tmp_path, store, kind):
    change, fault = EVIL[kind]
    evil = rewritten(archive, tmp_path / "evil.tar", change)
    status, said = store(tmp_path / "store", "import", evil)
    assert status == 2 and fault in said and "Traceback" not in said
    assert kept(tmp_path / "store") == set()
    assert {path.name for path in tmp_path.iterdir()} == {"evil.tar", "store"}
    assert not Path("/tmp/evil").exists()


@pytest.mark.attack("an archive with another report for a run that is there")
def test_an_import_does_not_replace_a_run_that_is_there(archive, first, tmp_path, store):
    root = tmp_path / "store"
    assert store(root, "import", archive)[0] == 0
    page = runs.folder(root, first.result.run_id) / "report.md"
    before = page.read_text()
    evil = rewritten(archive, tmp_path / "evil.tar", lambda old, new: [(old, b"x" if "report.md" in old else new)])
    store(root, "import", evil)
    assert page.read_text() == before


def test_an_archive_is_brought_into_a_store_of_two_disks(archive, tmp_path, store):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk only")
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "variance").symlink_to(elsewhere)
        assert store(tmp_path / "store", "import", archive)[0] == 0
        assert store(tmp_path / "store", "verify")[0] == 0
        assert [path for path in Path(elsewhere).iterdir() if path.name.startswith(".")] == []


def test_all_of_an_archive_is_on_the_disk_before_any_of_it_has_its_name(archive, tmp_path, store, monkeypatch):
    """What the loss of power would show; and the disk is not waited for once more for each artifact."""
    root, renamed, synced, named = tmp_path / "store", os.rename, [], []

    def rename(old, new):
        ours = [path.stat().st_ino for path in [Path(old), *Path(old).rglob("*")]]
        assert set(ours) <= set(synced)
        named.append((Path(new).parent, len(synced)))
        renamed(old, new)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", rename)
    assert store(root, "import", archive)[0] == 0
    names = Store(root).names()
    assert len(named) == len(names) > 5 and len({count for _, count in named}) == 1
    last = synced[named[-1][1] :]
    assert {folder.stat().st_ino for folder, _ in named} | {root.stat().st_ino} <= set(last)


def test_a_pipe_is_no_archive(tmp_path, store):
    os.mkfifo(tmp_path / "pipe")
    status, said = store(tmp_path / "store", "import", tmp_path / "pipe")
    assert status == 2 and "there is no file" in said


def test_a_cut_archive_is_refused(archive, tmp_path, store):
    content = archive.read_bytes()
    for name, part in {"half": content[: len(content) // 2], "text": b"no archive" * 100, "empty": b""}.items():
        (tmp_path / name).write_bytes(part)
        status, said = store(tmp_path / "store", "import", tmp_path / name)
        assert status == 2 and "is refused" in said, name
    status, said = store(tmp_path / "store", "import", tmp_path / "nowhere.tar")
    assert status == 2 and "there is no file" in said
    assert kept(tmp_path / "store") == set()
