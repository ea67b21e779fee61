"""Files of the size of the policy are read by the stages that need them, and by nothing else."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from pipeline_fixtures import Counting, Probe, make_run, probe, skip_figures, values

from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.files import digests as file_digests
from entropy_core.pipeline import statistics
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.store import archive, runs
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from flows.cli import main


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Probe:
    folder = tmp_path_factory.mktemp("sized")
    run = make_run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(values(run, folder / "artifacts", checkpoints=[str(run / "checkpoint-3")]))


def parameter_sized(artifact: Artifact) -> list[str]:
    """Its files that hold a tensor under a parameter's name."""
    files = artifact.manifest["files"].items()
    return [name for name, entry in files if any(tensor.endswith(".weight") for tensor in entry.get("tensors", ()))]


def ruin(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_statistics_and_plans_read_none_of_them(first, tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    root = Path(shutil.copytree(first.run.store.root, tmp_path / "artifacts"))
    store = Store(root)
    ruined = {(a.stage, name) for a in store.ls() for name in parameter_sized(a)}
    assert {stage for stage, _ in ruined} >= {"compute-update", "entropy-gradient"}
    for artifact in store.ls():
        for name in parameter_sized(artifact):
            ruin(artifact.directory / name)
    monkeypatch.setattr(file_digests, "_known", {})

    counting = Counting(store, Execution())
    again = statistics.variance(VarianceRequest(artifacts=str(root), confidence_level=0.5), store, counting)
    assert counting.was_computed == {"variance": 1, "report": 1}
    assert again.report.table("results.parquet")["H"].to_pylist() == [row["H"] for row in first.rows]
    assert all(step.cached for step in plan(first.config, preflight(first.config), store))
    config = first.config.model_copy(
        update={"execution": first.config.execution.model_copy(update={"artifacts": str(root)})}
    )
    assert all(step.cached for step in plan(config, first.checkpoints, store))
    assert main(["store", "verify", "--artifacts", str(root)]) == 1, "only this reads everything"


def vectors(out, execution):
    out.tensors({"a.weight": torch.ones(250)}, "vectors/direction.safetensors")
    out.json([1], "rows.json")
    return {}


@pytest.fixture
def recorded(tmp_path) -> tuple[Store, Artifact]:
    """A store with a run of one artifact that has a file among its vectors."""
    store = Store(tmp_path / "store")
    made = store.run(Stage("vectors", vectors), None, {})
    reference = made.to_dict()
    record = {
        "finished": "2026-01-01T00:00:00+00:00",
        "report": reference,
        "checkpoints": [{"checkpoint": "checkpoint-3", "inputs": {"update": {"artifact": reference}}}],
    }
    with runs.writing(store, "a-run") as folder:
        (folder / runs.RECORD).write_text(json.dumps(record))
    return store, made


def imported(store: Store, file: Path, **options: bool) -> tuple[set[str], Store]:
    """What an archive has of an artifact, and a store that it was brought into."""
    archive.export(store, "a-run", file, **options)
    with tarfile.open(file) as opened:
        names = {name.split("/", 2)[2] for name in opened.getnames() if name.startswith("vectors/")}
    other = Store(file.with_suffix(".store"))
    archive.load(other, file)
    return names, other


def test_an_archive_leaves_them_out(recorded, tmp_path, capsys):
    store, made = recorded
    ruin(made.directory / "vectors" / "direction.safetensors")
    names, other = imported(store, tmp_path / "run.tar")
    assert names == {"manifest.json", "rows.json", "vectors.dropped"}
    [there] = other.ls()
    assert there == made and there.json("rows.json") == [1]
    with pytest.raises(StoreError, match=r"direction\.safetensors of artifact .* is not kept"):
        there.path("vectors/direction.safetensors")
    assert main(["store", "verify", "--artifacts", str(other.root)]) == 0
    again, _ = imported(other, tmp_path / "again.tar", vectors=True)
    assert again == names, "what was left out is not there to be packed"
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "run.tar").read_bytes()


def test_an_archive_has_them_when_asked_for(recorded, tmp_path, capsys):
    store, made = recorded
    names, other = imported(store, tmp_path / "run.tar", vectors=True)
    assert names == {"manifest.json", "rows.json", "vectors/direction.safetensors"}
    [there] = other.ls()
    assert there.tensors("vectors/direction.safetensors")["a.weight"].sum() == 250
    ruin(made.directory / "vectors" / "direction.safetensors")
    command = ["store", "export", "a-run", str(tmp_path / "x.tar"), "--with-vectors", "--artifacts", str(store.root)]
    assert main(command) == 2 and "direction.safetensors was altered" in capsys.readouterr().err


def test_what_was_lost_and_not_left_out_is_unsound(recorded):
    store, made = recorded
    (made.directory / "vectors" / "direction.safetensors").unlink()
    assert store.check(made.stage, made.key)[1] == "direction.safetensors is missing"
