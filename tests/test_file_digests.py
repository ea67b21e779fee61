"""Digests of files are remembered, also by later processes, and never for a file that has changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_fixtures import make_run, values

from entropy_core.config.read import parse_config
from entropy_core.files import digests as file_digests
from entropy_core.files.checkpoint import checkpoint_digest, weights_digest
from entropy_core.files.digests import LARGE, file_digest, read_digest
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.sweep import execution_for
from entropy_core.store.store import Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and a clock by which files have settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SETTLED_NS", 0)
    forget()
    return tmp_path / "cache" / "entropy-probe" / "digests.jsonl"


def forget() -> None:
    """What a new process knows."""
    file_digests._known.clear()
    file_digests._memory.cache_clear()


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are read to be hashed."""
    names: list[str] = []
    real = file_digests.hashlib.file_digest

    def counted(file, name):
        names.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", counted)
    return names


def large(path: Path, text: bytes = b"weights", size: int = LARGE) -> Path:
    """A sparse file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(text)
        file.truncate(size)
    return path


def test_ten_large_checkpoints_are_read_once_for_all_processes(tmp_path, cache, hashed):
    folders = [tmp_path / f"checkpoint-{n}" for n in range(10)]
    for folder in folders:
        large(folder / "model.safetensors", folder.name.encode(), 8 * LARGE)
        large(folder / "optimizer.pt", folder.name.encode(), 16 * LARGE)
        (folder / "config.json").write_text("{}")
    first = [(checkpoint_digest(folder), weights_digest(folder)) for folder in folders]
    assert len(set(first)) == 10 and hashed.count("model.safetensors") == hashed.count("optimizer.pt") == 10
    forget()
    hashed.clear()
    assert [(checkpoint_digest(folder), weights_digest(folder)) for folder in folders] == first
    assert set(hashed) == {"config.json"}, "small files are read again, and nothing else"
    assert (cache.stat().st_mode & 0o777, cache.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_sweep_is_planned_again_without_reading_its_checkpoints(tmp_path, cache, hashed, monkeypatch):
    monkeypatch.setattr(file_digests, "LARGE", 1)
    config = parse_config(values(make_run(tmp_path / "run"), tmp_path / "artifacts"))

    def planned():
        checkpoints = preflight(config)
        execution_for(config, checkpoints)
        return plan(config, checkpoints, Store(config.store_root))

    first = planned()
    assert {"model.safetensors", "optimizer.pt"} <= set(hashed)
    forget()
    hashed.clear()
    assert planned() == first and hashed == []


PROGRAM = """
import sys
from pathlib import Path
from entropy_core.files import digests as file_digests
file_digests.SETTLED_NS = 0
if sys.argv[1] == "read":
    file_digests.hashlib.file_digest = None
print(*(file_digests.file_digest(Path(path)) for path in sys.argv[2:]))
"""


def test_processes_write_at_the_same_time_and_read_what_others_wrote(tmp_path, cache):
    paths = [str(large(tmp_path / f"{n}", str(n).encode())) for n in range(40)]
    command = [sys.executable, "-c", PROGRAM]
    shares = [[*paths[n::4], *paths[n - 1 :: 4]] for n in range(1, 5)]
    writers = [subprocess.Popen([*command, "write", *share], cwd=ROOT, stdout=subprocess.PIPE) for share in shares]
    assert [(writer.communicate(timeout=120), writer.returncode)[1] for writer in writers] == [0] * 4
    done = subprocess.run([*command, "read", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [read_digest(Path(path)) for path in paths], done.stderr
    for line in cache.read_text().splitlines():
        assert len(json.loads(line)) == 7


def replace(path: Path) -> None:
    large(path.with_name("new"), b"others!").replace(path)


def write_and_set_the_clock_back(path: Path) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"another")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [replace, write_and_set_the_clock_back, lambda path: os.truncate(path, LARGE + 1)])
def test_a_file_that_changed_is_read_again(tmp_path, cache, change):
    path = large(tmp_path / "file")
    before = file_digest(path)
    change(path)
    forget()
    assert file_digest(path) == read_digest(path) != before


def test_a_young_file_is_read_again(tmp_path, cache, hashed, monkeypatch):
    monkeypatch.setattr(file_digests, "SETTLED_NS", 60_000_000_000)
    path = large(tmp_path / "file")
    assert file_digest(path) == file_digest(path) and len(hashed) == 2
    assert not cache.exists()


def test_a_file_that_is_written_while_it_is_read_is_not_remembered(tmp_path, cache, monkeypatch):
    path = large(tmp_path / "file")
    real = file_digests.hashlib.file_digest

    def disturbed(file, name):
        digest = real(file, name)
        with path.open("r+b") as other:
            other.write(b"another")
        return digest

    monkeypatch.setattr(file_digests.hashlib, "file_digest", disturbed)
    file_digest(path)
    assert not cache.exists() and not file_digests._known


def test_of_a_damaged_memory_only_whole_lines_are_believed(tmp_path, cache, hashed):
    paths = [large(tmp_path / f"{n}", str(n).encode()) for n in range(3)]
    digests = [file_digest(path) for path in paths]
    first, second, third = cache.read_text().splitlines()
    wrong = third.replace(digests[2], "0" * 64)
    cache.write_text(f"{first}\n{second[:40]}\nno json\n[1, 2]\n{{}}\n{wrong}\n{second}")
    forget()
    hashed.clear()
    assert [file_digest(path) for path in paths] == digests
    assert hashed == ["1", "2"], "a torn line, one without its end and one that was edited"


@pytest.mark.parametrize("how", ["writable by the group", "a link", "in a folder for all", "a folder"])
def test_a_memory_that_others_could_have_written_is_neither_read_nor_written(tmp_path, cache, hashed, how):
    path = large(tmp_path / "file")
    digest = file_digest(path)
    content = cache.read_bytes()
    match how:
        case "writable by the group":
            cache.chmod(0o660)
        case "a link":
            cache.rename(tmp_path / "elsewhere")
            cache.symlink_to(tmp_path / "elsewhere")
        case "in a folder for all":
            cache.parent.chmod(0o777)
        case "a folder":
            cache.unlink()
            cache.mkdir()
    forget()
    hashed.clear()
    assert file_digest(path) == digest and hashed == ["file"]
    assert cache.is_dir() or cache.read_bytes() == content


def test_without_a_home_everything_is_only_slower(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    path = large(tmp_path / "file")
    assert file_digest(path) == file_digest(path) == read_digest(path)


def test_the_older_half_goes_when_it_is_long(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(file_digests, "MOST_BYTES", 4000)
    path = large(tmp_path / "file")
    for n in range(60):
        with path.open("r+b") as file:
            file.write(f"{n:02}".encode())
        digest = file_digest(path)
        assert cache.stat().st_size <= 4000 + 200
    assert digest in cache.read_text().splitlines()[-1] and len(list(cache.parent.iterdir())) == 1


def test_a_moved_store_and_copies_are_known_by_themselves(tmp_path, cache, hashed):
    path = large(tmp_path / "one" / "file")
    file_digest(path)
    (tmp_path / "one").rename(tmp_path / "two")
    file_digest(tmp_path / "two" / "file")
    assert hashed == ["file"]
    shutil.copyfile(tmp_path / "two" / "file", tmp_path / "copy")
    file_digest(tmp_path / "copy")
    assert hashed == ["file", "copy"]
