"""A store that came from elsewhere: what its records and manifests say is not believed where it leads out of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_fixtures import Counting, Probe, make_run, probe, skip_figures, values

from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import ProbeError, StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.store import manifest, runs
from entropy_core.store.store import Store
from flows.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def recorded(home) -> Probe:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(values(home / "run", home / "artifacts", checkpoints=[str(home / "run" / "checkpoint-3")]))


@pytest.fixture
def copied(home, recorded, tmp_path) -> Store:
    """A copy of the store in a folder with other things of the user's."""
    shutil.copytree(home / "artifacts", tmp_path / "user" / "artifacts")
    for folder in (tmp_path / "user" / "thesis", tmp_path / "user" / "thesis" / ("0" * 32)):
        folder.mkdir()
        (folder / "chapter.txt").write_text("the only copy")
    return Store(tmp_path / "user" / "artifacts")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_record(store: Store, change) -> None:
    [run_id] = runs.recorded(store.root)
    path = runs.folder(store.root, run_id) / runs.RECORD
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def again(store: Store) -> Any:
    run = Counting(store, Execution())
    return statistics.variance(VarianceRequest(artifacts=str(store.root), confidence_level=0.5), store, run)


OUTSIDE = [("../thesis", "0" * 32), ("..", "thesis"), ("score-e-batch", "../../../thesis"), ("", "../thesis")]


@pytest.mark.attack("a copied store whose record names folders outside of it")
@pytest.mark.parametrize(("stage", "key"), OUTSIDE)
@pytest.mark.parametrize("command", ["variance", "prune", "export", "ls", "verify"])
def test_a_record_does_not_lead_out_of_the_store(copied, tmp_path, stage, key, command):
    """`variance` would set aside what it takes for a damaged artifact, wherever that is."""

    def change(record):
        record["checkpoints"][0]["inputs"]["first_order_u"]["artifact"] |= {"stage": stage, "key": key}
        record["report"] |= {"stage": stage, "key": key}

    edit_record(copied, change)
    before = everything(tmp_path / "user" / "thesis")
    if command == "variance":
        with pytest.raises(StoreError):
            again(copied)
    else:
        extra = {"prune": ["--yes"], "export": ["latest", str(tmp_path / "x.tar")]}.get(command, [])
        main(["store", command, *extra, "--artifacts", str(copied.root)])
    assert everything(tmp_path / "user" / "thesis") == before
    assert len(before) == 2 and not list(tmp_path.glob("*.tar"))


@pytest.mark.attack("a manifest that names files outside of its artifact, rightly sealed")
@pytest.mark.parametrize("name", ["/etc/hostname", "../../../../thesis/chapter.txt", "manifest.json", ".", "a//b"])
def test_a_manifest_does_not_lead_out_of_its_artifact(copied, tmp_path, name):
    """One whose seal is right: anybody can compute it. The files of a report are copied under their names."""
    [run_id] = runs.recorded(copied.root)
    stage, key = next(one for one in runs.named(copied.root, run_id) if one[0] == "report")
    path = copied.root / stage / key / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("seal")
    content["files"][name] = {"bytes": 13, "sha256": "0" * 64}
    content["digest"] = manifest.content_digest(content["files"], content["summary"])
    path.write_bytes(manifest._sealed(content))
    assert manifest.check_manifest(path.parent, stage, key) == ({}, "its manifest names what is no part of it")
    assert copied.find(stage, key) is None


SENSELESS = {
    "no time": lambda made: made.pop("created"),
    "a time that is none": lambda made: made.update(created=None),
    "a time that moves the cursor": lambda made: made.update(created="\x1b[2J" * 8),
    "seconds in words": lambda made: made.update(wall_seconds="long"),
    "seconds without end": lambda made: made.update(wall_seconds=-1),
    "a file without a size": lambda made: made["files"].update(x={"sha256": "0" * 64}),
    "a file of no digest": lambda made: made["files"].update(x={"bytes": 1, "sha256": "x"}),
    "a name that moves the cursor": lambda made: made["files"].update({"\x1b[2J": {"bytes": 1, "sha256": "0" * 64}}),
    "upstream that is none": lambda made: made.update(upstream=[5]),
    "upstream elsewhere": lambda made: made.update(upstream=[{"stage": "..", "key": "0" * 32, "digest": "0" * 64}]),
    "definitions in a list": lambda made: made.update(definitions=["x"]),
    "a summary that is a list": lambda made: made.update(summary=[]),
    "a number that is tagged and is none": lambda made: made["inputs"].update(x={"float": 5}),
    "libraries that are numbers": lambda made: made["libraries"].update(torch=2.8),
}


@pytest.mark.attack("a manifest that makes no sense, under its own key and rightly sealed")
@pytest.mark.parametrize("change", SENSELESS.values(), ids=SENSELESS)
def test_a_manifest_that_makes_no_sense_is_unsound(copied, change, capsys):
    [run_id] = runs.recorded(copied.root)
    stage, key = next(one for one in runs.named(copied.root, run_id) if one[0] == "report")
    content = json.loads((copied.root / stage / key / "manifest.json").read_text())
    content.pop("seal")
    change(content)
    content["key"] = manifest.recipe_key(content)
    content["digest"] = manifest.content_digest(content["files"], content["summary"])
    folder = (copied.root / stage / key).rename(copied.root / stage / content["key"])
    (folder / "manifest.json").write_bytes(manifest._sealed(content))
    assert manifest.check_manifest(folder, stage, content["key"])[1].startswith("its manifest ")
    for command in ("ls", "verify", "prune"):
        assert main(["store", command, "--artifacts", str(copied.root)]) in (0, 1, 2)
    assert "\x1b" not in "".join(capsys.readouterr())


@pytest.mark.attack("a copied store whose record makes no sense")
@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("checkpoints"),
        lambda record: record.update(checkpoints=[5]),
        lambda record: record.update(checkpoints=5),
        lambda record: record["checkpoints"][0].pop("inputs"),
        lambda record: record["checkpoints"][0]["inputs"].update(first_order_u={"artifact": 5}),
        lambda record: record["checkpoints"][0]["inputs"].update(first_order_u={"artifact": {"stage": [], "key": {}}}),
        lambda record: record["checkpoints"][0]["inputs"].update(unheard_of=1),
        lambda record: record["checkpoints"][0]["inputs"].pop("first_order_u"),
        lambda record: record.update(report=None),
        lambda record: record.update(finished=5),
        lambda record: record.update(finished=None),
        lambda record: record.update(config=[]),
    ],
)
@pytest.mark.parametrize("command", ["variance", "prune", "ls", "export"])
def test_a_record_that_makes_no_sense_is_said_to(copied, tmp_path, capsys, change, command):
    edit_record(copied, change)
    if command == "variance":
        try:
            again(copied)
        except ProbeError as error:
            assert len(str(error)) < 1000
    else:
        extra = {"export": ["latest", str(tmp_path / "x.tar")]}.get(command, [])
        assert main(["store", command, *extra, "--artifacts", str(copied.root)]) in (0, 2)


@pytest.mark.attack("a copied store whose record makes no sense")
@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(finished=5),
        lambda record: record.update(checkpoints=5),
        lambda record: record["checkpoints"][0].pop("checkpoint"),
        lambda record: record["checkpoints"][0].update(checkpoint=["\x1b[2J"]),
        lambda record: record["report"].update(stage="../thesis"),
    ],
)
def test_a_record_that_makes_no_sense_is_listed_as_such(copied, capsys, change):
    edit_record(copied, change)
    for command in (["runs"], ["store", "ls"], ["store", "verify"]):
        assert main([*command, "--artifacts", str(copied.root)]) == (command[-1] == "verify")
        said = capsys.readouterr().out
        assert "does not say what the run needs: " in said and "\x1b" not in said


MOVES = "\x1b[2J\x1b]0;owned\x07\u202e"
"""Clears a terminal's screen, names its window, and turns the direction of what follows."""


@pytest.mark.attack("a copied store whose names move the cursor")
def test_what_is_printed_is_text(copied, home, capsys):
    [run_id] = runs.recorded(copied.root)
    edit_record(copied, lambda record: record["checkpoints"][0].update(checkpoint=MOVES, warnings=[MOVES]))
    table = runs.folder(copied.root, run_id) / "results.parquet"
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"checkpoint": MOVES} for row in rows]), table)
    (copied.root / ".quarantine" / MOVES).mkdir(parents=True)
    copied_run = shutil.copytree(home / "run" / "checkpoint-3", copied.root.parent / MOVES)
    for command in (["runs"], ["report"], ["store", "ls"], ["store", "verify"], ["store", "prune"]):
        main([*command, "--artifacts", str(copied.root)])
    main(["init", str(copied_run)])
    said = "".join(capsys.readouterr())
    assert not set(MOVES) - {*"[2J]0;owned"} & set(said)
    assert said.count("\\x1b[2J") > 5


def with_table(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "results.parquet")


def with_rows(change: Callable[[list], list]) -> Callable[[Path], object]:
    def changed(path: Path) -> None:
        rows = change(pq.read_table(path).to_pylist())
        pq.write_table(pa.Table.from_pylist(rows), path)

    return with_table(changed)


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


NO_TABLES = {
    "none": with_table(Path.unlink),
    "text": with_table(lambda path: path.write_text("no table")),
    "a part of one": with_table(lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "a pipe": with_table(lambda path: in_place_of(path, os.mkfifo)),
    "a folder": with_table(lambda path: in_place_of(path, Path.mkdir)),
    "a link to itself": with_table(lambda path: in_place_of(path, lambda to: to.symlink_to(to))),
    "no rows": with_rows(lambda rows: []),
    "other columns": with_rows(lambda rows: [{"x": 1}]),
    "words for numbers": with_rows(lambda rows: [row | {"H": "x", "delta_h1": "y"} for row in rows]),
    "nothing for numbers": with_rows(lambda rows: [row | {"ess_fraction": None, "eta": None} for row in rows]),
    "numbers for words": with_rows(lambda rows: [row | {"estimator": 1, "verdict": 2} for row in rows]),
}


@pytest.mark.attack("a copied store whose record makes no sense")
@pytest.mark.parametrize("change", NO_TABLES.values(), ids=NO_TABLES)
def test_tables_that_make_no_sense_are_said_to(copied, capsys, change):
    [run_id] = runs.recorded(copied.root)
    change(runs.folder(copied.root, run_id))
    assert main(["report", "--artifacts", str(copied.root)]) == 2
    said = capsys.readouterr().err
    assert ("cannot be shown" in said or "cannot be read" in said) and said.count("\n") == 1


@pytest.mark.attack("a copied store whose record names code in it")
@pytest.mark.parametrize("key", ["reward", "loss", "interventions"])
@pytest.mark.parametrize("command", [["interventions", "--direct"], ["store", "adopt", "latest"]])
def test_code_that_came_with_a_store_is_not_executed(copied, tmp_path, monkeypatch, capsys, command, key):
    """An archive brings any file that its manifests name."""
    [run_id] = runs.recorded(copied.root)
    evil, proof = runs.folder(copied.root, run_id) / "evil.py", tmp_path / "proof"
    evil.write_text(f"open({str(proof)!r}, 'w')\ndef f(*_, **__): return []\n")
    (tmp_path / "linked").symlink_to(evil.parent)
    said = f"{tmp_path / 'linked' / 'evil.py'}:f"

    def change(record):
        of = record["config"] if key == "interventions" else record["config"]["update"]
        of[key] = [said] if key == "interventions" else said

    edit_record(copied, change)
    if key == "interventions" and command[0] == "interventions":
        command = [*command, "--try", "positives_only"]  # in place of those of the record
        assert main([*command, "--artifacts", str(copied.root)]) in (0, 2)
    else:
        assert main([*command, "--artifacts", str(copied.root)]) == 2
        assert "names code in the store" in capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.attack("prune is told a folder that is no store")
@pytest.mark.parametrize("command", [["prune", "--yes"], ["prune"], ["seal"]])
def test_a_folder_that_is_no_store_is_left_alone(copied, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("ENTROPY_PROBE_SEAL_KEY", "a key")
    folder = tmp_path / "user"
    (folder / "thesis" / ".tmp-draft").mkdir()
    before = sorted(folder.rglob("*"))
    assert main(["store", *command, "--artifacts", str(folder)]) == 2
    assert "there is no store in" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.attack("a copied store with a link in place of a run")
def test_a_run_is_not_written_through_a_link(copied, tmp_path):
    again(copied)
    run_id = runs.recorded(copied.root)[-1]
    outside = (copied.root / "runs" / run_id).rename(tmp_path / "outside")
    (copied.root / "runs" / run_id).symlink_to(outside)
    (outside / "report.md").write_text("the only copy")
    before = everything(outside)
    with pytest.raises(StoreError, match="is a link to another folder"):
        again(copied)
    assert main(["store", "prune", "--keep-runs", "0", "--yes", "--artifacts", str(copied.root)]) == 0
    assert everything(outside) == before
