"""`entropy-probe store`: what is there, is it sound, why is it another one, and what may go."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from pipeline_fixtures import Counting, Probe
from store_command_fixtures import flip, kept, settings

from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline import sweep as pipeline
from entropy_core.store import runs
from entropy_core.store.store import Stage, Store
from flows.store_commands import in_words

pytest_plugins = ["store_command_fixtures"]
ROOT = Path(__file__).resolve().parents[1]


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


def draw(out, execution, seed):
    out.json([seed], "numbers.json")
    return {}


DRAW = Stage("draw", draw)


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
