"""`store adopt`: after a real edit of the project's files, in processes of their own that run the edited code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pipeline_fixtures import Probe, make_run, probe, skip_figures, values

from entropy_core.store.adoption import Adoption
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from flows.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adoption")
    make_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def first(home) -> Probe:
    """A sweep by the code as it is."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(settings(home, home / "artifacts"))


def settings(home: Path, artifacts: Path) -> dict:
    return values(home / "run", artifacts, checkpoints=[str(home / "run" / "checkpoint-3")])


@pytest.fixture
def edited(home, first, tmp_path) -> Callable[..., list[list[Any]]]:
    """Edit a copy of the project, and call commands of the store there, on a copy of the store, in one process."""
    shutil.copytree(home / "artifacts", tmp_path / "artifacts", copy_function=shutil.copy2)
    for package in ("entropy_core", "flows", "tasks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sweep.json").write_text(json.dumps(settings(home, tmp_path / "artifacts")))

    def call(*commands: str, edit: tuple[str, str, str] | None = None) -> list[list[Any]]:
        if edit:
            path = tmp_path / edit[0]
            assert path.read_text().count(edit[1]) == 1
            path.write_text(path.read_text().replace(edit[1], edit[2]))
        lines = [["store", *one.split(), "--artifacts", str(tmp_path / "artifacts")] for one in commands]
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        process = [sys.executable, "-c", EACH_COMMAND, json.dumps(lines)]
        done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


EACH_COMMAND = """
import contextlib, io, json, sys
from flows.cli import main
done = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(line)
    done.append((status, said.getvalue() or error.getvalue()))
print(json.dumps(done))
"""


def rows_of(said: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split(maxsplit=5)[1:] for line in said.splitlines()[1:-1]}


def test_a_real_edit_that_changes_nothing(edited, tmp_path):
    """Every stage that handles sequences is concerned: one of each is computed, the rest is linked."""
    store = Store(tmp_path / "artifacts")
    before = set(store.names())
    edit = ("entropy_core/numerics/ragged.py", "return offsets_N1.diff()", "return offsets_N1.diff() * 1")
    (status, said), *then = edited("adopt sweep.json", "explain sweep.json", edit=edit)
    assert status == 0, said
    counts = {stage: [int(cell) for cell in cells] for stage, cells in rows_of(said).items()}
    assert counts["load-prompts"] == [1, 0, 0, 0], "it reaches no lengths"
    assert counts["sample-e-batch"] == counts["score-e-batch"] == counts["importance"] == [0, 1, 1, 0]
    assert counts["variance"] == [0, 1, 0, 0]
    assert all(missing == 0 for *_, missing in counts.values())

    new = set(store.names()) - before
    assert len(new) == sum(recomputed + taken for _, recomputed, taken, _ in counts.values())
    [manifest] = [m for m in (store.manifest(*name) for name in new if name[0] == "score-e-batch") if "adopted" in m]
    old = Artifact.from_dict(manifest["adopted"]["from"], store.root)
    assert (old.stage, old.key) in before and old.digest == manifest["digest"]
    assert ("score-e-batch", manifest["adopted"]["evidence"]) in new
    assert manifest["created"] == old.manifest["created"] and manifest["code"] != old.manifest["code"]
    file = Artifact("score-e-batch", manifest["key"], manifest["digest"], store.root).path("tokens.safetensors")
    assert file.samefile(old.path("tokens.safetensors"))
    assert not list(store.root.glob(".tmp-*"))

    [(status, said)] = then
    assert status == 0 and all(line.endswith(" 0 would run") for line in said.splitlines()), said
    assert main(["store", "verify", "--artifacts", str(store.root)]) == 0


def test_what_never_ran_is_not_there(home, first, tmp_path, capsys):
    """Of a run by its name, and with the code as it is, so that all the rest is there."""
    never_ran = shutil.ignore_patterns("sample-u-batch")
    shutil.copytree(home / "artifacts", tmp_path / "artifacts", copy_function=shutil.copy2, ignore=never_ran)
    assert main(["store", "adopt", first.result.run_id, "--artifacts", str(tmp_path / "artifacts")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["sample-u-batch"] == ["0", "0", "0", "2"]
    assert rows["score-u-batch"] == ["0", "0", "0", "2"], "nobody knows what it would be made from"
    assert rows["score-e-batch"] == ["2", "0", "0", "0"]


def test_a_change_of_one_number_is_refused(edited, tmp_path):
    """Prompts are taken over, as the edit does not concern them; sampling is not, and nothing that comes after it."""
    store = Store(tmp_path / "artifacts")
    before = {name: store.root.joinpath(*name, "manifest.json").stat().st_ino for name in store.names()}
    edit = ("entropy_core/numerics/philox.py", "_ROUNDS = 10", "_ROUNDS = 9")
    [(status, said)] = edited("adopt sweep.json", edit=edit)
    assert status == 1, said
    rows = rows_of(said)
    assert rows["load-prompts"] == ["1", "0", "0", "0"]
    assert rows["sample-e-batch"][:4] == ["0", "0", "0", "0"]
    refusal = rows["sample-e-batch"][4]
    assert "sequences.parquet: " in refusal or "tokens.safetensors: " in refusal
    assert " → " in refusal and "2 stages are refused" in said
    after = {name: store.root.joinpath(*name, "manifest.json").stat().st_ino for name in store.names()}
    assert after == before and not list(store.root.glob(".tmp-*"))


# --- what a process of its own is not needed for ---------------------------------------------------------------------


def write(out, execution, *, n):
    out.tensors({"x": torch.tensor(execution.tensor)})
    out.table(pyarrow.table({"y": execution.numbers}), "rows.parquet")
    out.json({"n": n, "rest": execution.rest}, "notes.json")
    return {"sum": execution.sum}


class Way:
    numbers, tensor, rest, sum = [1.0, 2.0], [1.0, 2.0], 0, 0


WRITE = Stage("write", write)


@pytest.fixture
def upgraded(tmp_path, monkeypatch):
    """A store with three artifacts that were made with an earlier release of torch."""
    store = Store(tmp_path / "store")
    with monkeypatch.context() as earlier:
        earlier.setattr("torch.__version__", "1.9.1")
        for n in range(3):
            store.run(WRITE, Way(), {"n": n})
    return store


def adopted(store: Store, way: Way) -> Adoption:
    adoption = Adoption(store, lambda trial, stage, inputs: trial.run(stage, way, inputs), lambda stage: stage)
    for n in range(3):
        adoption(WRITE, {"n": n}, "")
    return adoption


def test_another_release_of_a_library_can_be_adopted_too(upgraded):
    old = {artifact.key for artifact in upgraded.ls()}
    outcome = adopted(upgraded, Way()).outcomes["write"]
    assert (outcome.recomputed, outcome.taken_over, outcome.refused) == (1, 2, [])
    new = [artifact for artifact in upgraded.ls() if artifact.key not in old]
    assert sorted("adopted" in artifact.manifest for artifact in new) == [False, True, True]
    assert all(artifact.tensors()["x"].tolist() == [1.0, 2.0] for artifact in new)
    assert adopted(upgraded, Way()).outcomes["write"].found == 3


def test_without_links_the_files_are_copied(upgraded, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links here")))
    assert adopted(upgraded, Way()).outcomes["write"].taken_over == 2


def test_a_damaged_artifact_is_not_taken_over(upgraded):
    for artifact in upgraded.ls():
        path = artifact.directory / "rows.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    awaited = Adoption(upgraded, lambda *_: pytest.fail("computed"), lambda stage: stage)
    assert awaited(WRITE, {"n": 1}, "") == "write" and awaited.outcomes["write"].missing == 1


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"numbers": [1.0, 2.5]}, "rows.parquet: y, row 1: 2.0 → 2.5"),
        ({"tensor": [1.0, 2.5]}, "tensors.safetensors: x[1]: 2.0 → 2.5"),
        ({"tensor": [1.0]}, "tensors.safetensors: x: (2,) torch.float32 → (1,) torch.float32"),
        ({"rest": 1}, """notes.json: line 3: '"rest": 0' → '"rest": 1'"""),
        ({"sum": 1}, "summary: sum: 0 → 1"),
    ],
)
def test_the_first_difference_is_named(upgraded, tmp_path, change, where):
    way = Way()
    vars(way).update(change)
    outcome = adopted(upgraded, way).outcomes["write"]
    [refused] = outcome.refused
    assert refused.partition(": ")[2] == where and (outcome.recomputed, outcome.taken_over) == (0, 0)
    assert len(list(upgraded.ls())) == 3 and not list(upgraded.root.glob(".tmp-*"))
