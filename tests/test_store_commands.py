"""`entropy-probe store`: what is there, is it sound, why is it another one, what may go, and to elsewhere."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import Counting, Probe, make_run, probe, skip_figures, values

from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline import sweep as pipeline
from entropy_core.store import runs
from entropy_core.store.store import Stage, Store
from flows.cli import main
from flows.store_commands import in_words

ROOT = Path(__file__).resolve().parents[1]


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    return values(folder / "run", folder / "artifacts", checkpoints=[str(folder / "run" / "checkpoint-3")], **sections)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def first(home) -> Probe:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(settings(home))


@pytest.fixture(scope="module")
def second(home, first) -> Probe:
    """The same at another temperature."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(settings(home, generation={"temperature": 0.5}))


@pytest.fixture
def away(home, first, second, tmp_path) -> Path:
    """A copy, to change."""
    return shutil.copytree(home, tmp_path / "away")


@pytest.fixture
def store(capsys):
    """Call a command; its exit status and what it printed."""

    def call(root: Path, *arguments: Any) -> tuple[int, str]:
        status = main(["store", *map(str, arguments), "--artifacts", str(root)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def draw(out, execution, seed):
    out.json([seed], "numbers.json")
    return {}


DRAW = Stage("draw", draw)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- ls, verify ------------------------------------------------------------------------------------------------------


def test_ls_says_size_time_and_which_runs_need_it(home, first, second, store):
    status, said = store(home / "artifacts", "ls")
    *rows, last = said.splitlines()[1:]
    assert status == 0 and len(rows) == len(first.run.store.names())
    assert last.startswith(f"{len(rows)} artifacts, ")
    by_key = {row.split()[1]: row for row in rows}
    of_both, of_one = first.run.artifacts("load-checkpoint")[0], first.run.artifacts("sample-e-batch")[0]
    assert all(result in by_key[of_both.key] for result in (first.result.run_id, second.result.run_id))
    assert by_key[of_one.key].endswith(first.result.run_id)
    size = sum(entry["bytes"] for entry in of_one.manifest["files"].values())
    assert in_words(size) in by_key[of_one.key]
    assert re.search(r" \d{4}-\d\d-\d\dT\d\d:\d\dZ +\d+\.\d ", by_key[of_one.key])


def test_a_store_that_is_not_there_is_empty_and_is_not_made(home, store):
    assert store(home / "nowhere", "ls") == (0, "0 artifacts, 0 B\n")
    assert not (home / "nowhere").exists()


def test_verify_names_what_is_unsound_and_changes_nothing(away, first, store):
    root = away / "artifacts"
    altered, cut, gone = first.run.artifacts("score-e-batch") + first.run.artifacts("first-order-e")[:1]
    flip(root / altered.stage / altered.key / "tokens.safetensors")
    os.truncate(root / cut.stage / cut.key / "manifest.json", 100)
    shutil.rmtree(root / gone.stage / gone.key)
    status, said = store(root, "verify")
    lines = dict(line.split(": ", 1) for line in said.splitlines()[:-1])
    assert status == 1
    assert lines.keys() == {f"{a.stage}/{a.key}" for a in (altered, cut, gone)}
    assert "tokens.safetensors was altered" in lines[f"{altered.stage}/{altered.key}"]
    assert "manifest was damaged" in lines[f"{cut.stage}/{cut.key}"]
    assert f"missing, and the run {first.result.run_id} needs it" in lines[f"{gone.stage}/{gone.key}"]
    assert not (root / ".quarantine").exists()


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_two_keys_names_the_field_through_all_that_comes_before(home, first, second, store):
    a, b = (swept.run.artifacts("variance")[0].key for swept in (first, second))
    status, said = store(home / "artifacts", "explain", a[:12], f"variance/{b}")
    [line] = said.splitlines()[1:]
    assert status == 0
    assert line.startswith("    inputs.policy.temperature: 1.0 → 0.5 (")
    assert "sample-e-batch" in line and "score-e-batch" in line
    assert store(home / "artifacts", "explain", a, a)[1].endswith("nothing differs\n")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (["0000000000"], "names no artifact"),
        (["variance/"], "names no artifact"),
        (["draw/a", "b"], "names no artifact"),
    ],
)
def test_explain_says_what_it_does_not_know(home, first, store, what, said):
    status, text = store(home / "artifacts", "explain", *what)
    assert status == 2 and said in text and "ls` lists" in text


def test_explain_refuses_keys_of_two_stages_and_keys_cut_too_short(home, first, store):
    keys = [first.run.artifacts(stage)[0].key for stage in ("variance", "report")]
    assert "are not of one stage" in store(home / "artifacts", "explain", *keys)[1]
    stage = first.run.artifacts("score-e-batch")[0].stage
    first_letter = {name[1][0] for name in first.run.store.names()}
    assert len(first_letter) < len(first.run.store.names()), "so some letter begins several keys"
    said = [store(home / "artifacts", "explain", letter)[1] for letter in sorted(first_letter)]
    assert any("artifacts: " in text for text in said), stage


PROGRAM = """
import sys
from entropy_core.store.store import Stage, Store
from {package}.stage import stage
made = Store(sys.argv[1]).run(Stage("sum", stage), None, {{"x": int(sys.argv[2])}})
print(made.key)
"""


def test_explain_names_the_definition_that_was_edited(tmp_path, store, monkeypatch):
    """Also when the artifact is an earlier one's successor; comments and unrelated modules are no reason."""
    package = tmp_path / "code" / f"code_{tmp_path.name}"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(ROOT)]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    files = {
        "__init__": "",
        "helper": "FACTOR = 2\n\ndef double(x):\n    return FACTOR * x\n",
        "stage": "from .helper import double\n\ndef stage(out, execution, x):\n    return {'y': double(x)}\n",
        "unrelated": "X = 1\n",
    }
    for name, source in files.items():
        (package / f"{name}.py").write_text(source)

    def run(x: int) -> str:
        command = [sys.executable, "-c", PROGRAM.format(package=package.name), tmp_path / "store", str(x)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = run(1)
    (package / "unrelated.py").write_text("X = 2\n")
    (package / "helper.py").write_text("# twice\n" + files["helper"])
    assert run(1) == before
    assert "is the code that is here" in store(tmp_path / "store", "explain", before)[1]
    (package / "helper.py").write_text("from .other import FACTOR\n\n" + files["helper"].partition("\n\n")[2])
    (package / "other.py").write_text("FACTOR = 2\n")
    assert run(1) == before, "a definition that was moved is the same"

    (package / "helper.py").write_text(files["helper"].replace("2", "3"))
    status, said = store(tmp_path / "store", "explain", before)
    helper = f"definition {package.name}.helper:FACTOR"
    assert status == 0
    assert f"{helper} is another one now, so these would run again: sum/{before[:12]}" in said

    after = run(1)
    assert after != before
    [line] = store(tmp_path / "store", "explain", before, after)[1].splitlines()[1:]
    assert re.fullmatch(rf"    {helper}: code \w{{12}} → code \w{{12}} \(sum\)", line)
    other = run(2)
    said = store(tmp_path / "store", "explain", other)[1]
    assert f"From the nearest other one, sum/{after}, to this:\n    inputs.x: 1 → 2 (sum)\n" in said


def test_explain_a_configuration_says_what_would_run_and_why(away, first, store, monkeypatch):
    monkeypatch.setattr("entropy_core.policy.pretrained.load_policy", lambda *_: pytest.fail("a model was loaded"))
    config = away / "config.yaml"
    config.write_text(json.dumps(settings(away)))
    status, said = store(away / "artifacts", "explain", config)
    assert status == 0
    assert all(line.endswith(" 0 would run") for line in said.splitlines())
    config.write_text(json.dumps(settings(away, importance={"etas": [0, 1, 3]}, batch_config={"B_U": 5})))
    lines = store(away / "artifacts", "explain", config)[1].splitlines()
    by_stage = {line.split()[0]: (line.split()[1], line.split()[3]) for line in lines if line[0] != " "}
    assert by_stage["sample-e-batch"] == by_stage["score-e-batch"] == ("2", "0")
    assert by_stage["sample-u-batch"] == ("2", "1")
    reasons = {line.strip() for line in lines if line[0] == " "}
    assert "inputs.count: 8 → 4 (sample-u-batch)" in reasons
    assert "compute-update would run" in reasons
    shutil.rmtree(away / "artifacts" / "load-prompts")
    assert "it was never computed in this store" in store(away / "artifacts", "explain", config)[1]


# --- prune -----------------------------------------------------------------------------------------------------------


def kept(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts}


def test_prune_lists_what_no_run_needs_and_deletes_it_when_told_to(away, first, second, store):
    root = away / "artifacts"
    before = kept(root)
    unneeded = Store(root).run(DRAW, None, {"seed": 1}).directory
    leftovers = [root / "draw" / ".tmp-left", root / "runs" / ".tmp-left", root / ".quarantine" / "draw-x"]
    for path in leftovers:
        path.mkdir(parents=True)
        (path / "file").write_text("x" * 100)
    status, said = store(root, "prune")
    assert status == 0
    listed = [line.split()[0] for line in said.splitlines()[1:-1]]
    assert {root / name for name in listed} == {unneeded, *leftovers}
    assert "--yes deletes them" in said and unneeded.exists()
    status, said = store(root, "prune", "--yes")
    assert status == 0 and "4 things" in said
    assert kept(root) == before
    assert store(root, "verify")[0] == 0
    assert "nothing to do" in store(root, "prune", "--yes")[1]


def test_prune_keeps_all_that_a_kept_run_needs(away, first, second, store):
    """The second run shares its prompts and its optimizer with the first; both are needed, and so is what made them."""
    root = away / "artifacts"
    needed = {(a.stage, a.key) for _, _, a in second.run.asked}
    status, said = store(root, "prune", "--keep-runs", 1, "--yes")
    assert status == 0 and f"runs/{first.result.run_id}" in said
    assert set(Store(root).names()) == needed
    assert runs.recorded(root) == [second.result.run_id]
    again = Counting(Store(root), Execution())
    statistics.variance(VarianceRequest(artifacts=str(root)), Store(root), again)
    assert again.was_computed == {}
    assert store(root, "prune", "--keep-runs", 0, "--yes")[0] == 0
    assert Store(root).names() == [] and kept(root) == set()


@pytest.mark.attack("everything is pruned beside a run with a hidden name")
def test_prune_keeps_a_run_whose_name_is_hidden(away, first, second, store):
    """As runs of earlier versions may be."""
    root = away / "artifacts"
    folder = runs.folder(root, first.result.run_id)
    folder.rename(folder.with_name(f".{folder.name}"))
    before = kept(root)
    assert store(root, "prune", "--yes")[0] == 0
    assert kept(root) == before


def test_prune_refuses_when_it_cannot_tell_what_a_run_needs(away, first, second, store):
    root = away / "artifacts"
    damaged = second.run.artifacts("variance")[0]
    flip(root / damaged.stage / damaged.key / "manifest.json")
    before = kept(root)
    status, said = store(root, "prune", "--yes")
    assert status == 2 and f"variance/{damaged.key}" in said and "cannot be told" in said
    assert kept(root) == before
    (root / "runs" / first.result.run_id / "run.json").write_text("{")
    status, said = store(root, "prune", "--yes")
    assert status == 2 and f"what the run {first.result.run_id} needs cannot be told" in said
    assert len(kept(root)) == len(before)


def test_prune_waits_for_no_sweep_and_disturbs_none(away, first, store):
    root = away / "artifacts"
    program = "import sys, time\nfrom entropy_core.store.store import Store\n"
    program += "with Store(sys.argv[1]).in_use():\n    print('in', flush=True)\n    time.sleep(600)\n"
    command = [sys.executable, "-c", program, root]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as sweep:
        try:
            assert sweep.stdout and sweep.stdout.readline() == "in\n"
            status, said = store(root, "prune", "--yes")
            assert status == 2 and "a sweep is under way" in said
        finally:
            sweep.kill()
    assert store(root, "prune", "--yes")[0] == 0, "a dead process holds nothing"


def test_a_sweep_holds_its_store(home, first, store, monkeypatch):
    held = []
    monkeypatch.setattr(pipeline, "_measured", lambda *_: held.append(store(home / "artifacts", "prune")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.sweep(first.config, first.checkpoints, first.run.store, first.run)
    assert held[0][0] == 2 and "a sweep is under way" in held[0][1]


# --- export, import --------------------------------------------------------------------------------------------------


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


# --- a store that cannot be written ----------------------------------------------------------------------------------


@pytest.fixture
def anybody(away, monkeypatch):
    """A folder with a store that can only be read, and a folder `mine`; root, who may write all, becomes nobody."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:  # pytest's own folders are root's alone
        folder = Path(name)
        shutil.copytree(away / "artifacts", folder / "a store")
        (folder / "mine").mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "mine" / "cache"))
        subprocess.run(["chmod", "-R", "a=rX", folder / "a store"], check=True)
        stack.callback(subprocess.run, ["chmod", "-R", "u+w", folder], check=True)
        if os.geteuid() == 0:
            folder.chmod(0o755)
            (folder / "a store" / "prefect").mkdir(0o700)
            os.chown(folder / "mine", 65534, 65534)
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        yield folder


def test_a_writable_store_of_links_reads_from_a_read_only_one(first, second, anybody, store):
    """What the error advises."""
    theirs, mine = anybody / "a store", Store(anybody / "mine" / "store")
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*")}
    request = VarianceRequest(artifacts=str(theirs), confidence_level=0.5)
    with pytest.raises(StoreError, match="read-only for you") as raised:
        statistics.variance(request, Store(theirs), Counting(Store(theirs), Execution()))
    [command] = re.findall("`(.*) NEW`", str(raised.value))
    copied = subprocess.run([*shlex.split(command), mine.root], capture_output=True, text=True, check=False)
    assert [line for line in copied.stderr.splitlines() if "prefect" not in line] == []
    again = Counting(mine, Execution())
    result = statistics.variance(request.model_copy(update={"artifacts": str(mine.root)}), mine, again)
    assert again.was_computed == {"variance": 1, "report": 1}
    assert result.run_directory.is_relative_to(mine.root)
    assert store(mine.root, "verify")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in theirs.rglob("*")} == before


def test_a_run_folder_is_never_half_written(first, tmp_path):
    """The record is the last to take its place, and until then the earlier one is whole."""
    store = Store(tmp_path / "store")
    with runs.writing(store, "a-run") as folder:
        (folder / "results.parquet").write_text("old")
        (folder / "run.json").write_text('{"finished": "1"}')
    with pytest.raises(StoreError, match="the disk or the quota is full"), runs.writing(store, "a-run") as folder:
        (folder / "results.parquet").write_text("new")
        raise OSError(28, "No space left on device")
    final = runs.folder(store.root, "a-run")
    assert {path.name: path.read_text() for path in final.iterdir()} == {
        "results.parquet": "old",
        "run.json": '{"finished": "1"}',
    }
    assert [path.name for path in final.parent.iterdir()] == ["a-run"]
