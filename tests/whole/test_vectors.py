"""What is of the size of the policy: in blocks, in files, and in a store that may let it go."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import NAMES, Probe, make_run, probe, skip_figures, values, write_reward
from safetensors.torch import load_file, save_file
from store_fixtures import quarantined

from entropy_core.config.read import parse_config
from entropy_core.errors import StoreError
from entropy_core.losses import taken_step
from entropy_core.numerics import vectors
from entropy_core.numerics.vectors import Block, Lazy, blocks_of, dot, global_norm, in_blocks
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.store import vectors as of_store
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Store
from entropy_core.store.tensor_file import TensorFile, TensorWriter
from flows.cli import main as store_command

# --- blocks ----------------------------------------------------------------------------------------------------------


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"b": (7, 5), "a": (3,), "τ": (2, 2, 2), "none": (0, 4), "scalar": ()}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def test_blocks_cover_every_number_once_in_the_order_of_the_names(monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 6)
    found = blocks_of(tensors())
    assert list(found) == sorted(found)
    assert [block for block in found if block.name == "b"] == [
        *(Block("b", start, start + 6) for start in range(0, 30, 6)),
        Block("b", 30, 35),
    ]
    assert sum(block.stop - block.start for block in found) == 35 + 3 + 8 + 1


def test_a_vector_in_blocks_is_the_vector(monkeypatch):
    whole, other = tensors(), tensors()
    expected = sum(float((whole[name].double() * other[name].double()).sum()) for name in sorted(whole))
    assert dot(in_blocks(whole), in_blocks(other)) == expected == dot(whole, other)  # a block holds any of them
    monkeypatch.setattr(vectors, "BLOCK", 4)
    assert dot(in_blocks(whole), in_blocks(other)) == pytest.approx(expected, rel=1e-14)
    assert global_norm(in_blocks(whole)) ** 2 == pytest.approx(dot(whole, whole), rel=1e-14)
    for (name, start, stop), values_ in in_blocks(whole).items():
        assert values_.dtype == torch.float64
        assert torch.equal(values_, whole[name].flatten()[start:stop].double())
    wide = tensors(torch.float64)
    assert in_blocks(wide)[Block("a", 0, 3)].data_ptr() == wide["a"].data_ptr()  # no copy where none is needed


def test_a_lazy_vector_is_made_anew_for_every_use():
    made = []
    lazy = Lazy(["x", "y"], lambda key: made.append(key) or torch.ones(2))
    assert len(lazy) == 2 and made == []
    assert global_norm(lazy) == 2.0
    assert lazy["y"] is not lazy["y"]
    assert made == ["x", "y", "y", "y"]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_is_what_the_library_writes(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(vectors, "BLOCK", 4)
    written = tensors(dtype)
    save_file(written, tmp_path / "library.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    with TensorWriter(tmp_path / "ours.safetensors", shapes, dtype) as file:
        for block, values_ in reversed(list(in_blocks(written).items())):  # in any order
            file.write(block, values_)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()

    read = TensorFile(tmp_path / "library.safetensors")
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in written)
    assert torch.equal(read.block(Block("b", 4, 9)), written["b"].flatten()[4:9])
    (tmp_path / "library.safetensors").unlink()
    assert torch.equal(read["b"], written["b"])  # it is open


def test_a_file_that_ends_early_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(10)}, path)
    read = TensorFile(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(OSError, match="the tensor x ends early"):
        read["x"]


# --- in the store ----------------------------------------------------------------------------------------------------

DIRECTION, GRADIENT = "vectors/direction.safetensors", "vectors/gradient.safetensors"
STATISTICS = {"variance", "report"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A run, a sweep of it that keeps its vectors, and one that does not, each in a store of its own."""
    folder = tmp_path_factory.mktemp("origin")
    make_run(folder / "run")
    write_reward(folder)
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        probe(config_of(folder, folder / "kept"))
        probe(config_of(folder, folder / "dropped", keep=False))
    return folder


@pytest.fixture
def home(origin, tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    return shutil.copytree(origin, tmp_path / "home")


def config_of(folder: Path, artifacts: Path, keep: bool = True, **sections: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "update": {"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
        "importance": {"estimators": ["per_decision", "path_integral"]},
        "execution": {"keep_vectors": keep},
    }
    for name, section in sections.items():
        own[name] = own.get(name, {}) | section
    return values(folder / "run", artifacts, **own)


def vectors_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("vectors/*.safetensors"))


def digests(done: Probe) -> dict[str, list[str]]:
    return {stage: [a.digest for a in done.run.artifacts(stage)] for stage in {name for name, _, _ in done.run.asked}}


def test_without_its_vectors_a_sweep_is_the_same(home):
    kept, dropped = (probe(config_of(home, home / name, name == "kept")) for name in ("kept", "dropped"))
    assert kept.run.was_computed == dropped.run.was_computed == {}
    assert digests(kept) == digests(dropped)
    assert kept.result.run_id == dropped.result.run_id
    halves = [f"{kind}_{half}.safetensors" for kind in ("entropy", "length") for half in (0, 1)]
    assert vectors_in(home / "kept") == sorted(["direction.safetensors", "gradient.safetensors", *halves] * len(NAMES))
    assert vectors_in(home / "dropped") == []


def test_while_a_sweep_runs_only_what_it_still_needs_is_there(home):
    """Bytes of vectors in the store, per parameter and checkpoint: 24 at most in float32."""
    asked = config_of(home, home / "new", keep=False, policy={"dtype": "float32"})
    config = parse_config(asked | {"interventions": [{"lr": 0.5}], "lab": {"measure": "all"}})
    checkpoints = preflight(config)
    from pipeline_fixtures import Counting

    from entropy_core.pipeline.runner import Runner
    from entropy_core.pipeline.sweep import execution_for, sweep

    run = Counting(Store(config.store_root), execution_for(config, checkpoints))
    seen: dict[str, int] = {}

    def weighing(stage, inputs, label):
        artifact = run(stage, inputs, label)
        size = sum(path.stat().st_size for path in config.store_root.rglob("vectors/*"))
        seen[stage.name] = max(size, seen.get(stage.name, 0))
        return artifact

    sweep(config, checkpoints, Store(config.store_root), Runner(weighing))
    count = run.artifacts("load-checkpoint")[0].summary["parameters"]
    headers = 6 * 2048
    assert 24 * count < seen["entropy-gradient"] <= 24 * count + headers
    assert 12 * count < seen["altered-step"] == seen["importance"] <= 12 * count + headers, "two steps and g"
    assert 8 * count < seen["path-integral"] <= 8 * count + headers
    assert seen["report"] == 0


def test_the_same_sweep_again_and_the_statistics_need_no_vectors(home):
    again = probe(config_of(home, home / "dropped", keep=False, variance={"confidence_level": 0.9}))
    assert again.run.was_computed == {"variance": len(NAMES), "report": 1}
    assert vectors_in(home / "dropped") == []


def test_another_step_size_computes_the_step_again_and_then_only_itself(home):
    done = probe(config_of(home, home / "dropped", keep=False, importance={"etas": [0, 1, 2]}))
    assert done.run.was_computed == {
        "importance": 2 * len(NAMES),
        "path-integral": 2 * len(NAMES),
        "variance": len(NAMES),
        "report": 1,
        "compute-update": len(NAMES),
    }
    assert vectors_in(home / "dropped") == []
    kept = probe(config_of(home, home / "kept", importance={"etas": [0, 1, 2]}))
    assert digests(done)["variance"] == digests(kept)["variance"]


def test_another_step_computes_the_gradient_of_the_entropy_again(home):
    done = probe(config_of(home, home / "dropped", keep=False, update={"max_grad_norm": 1e-3}))
    assert done.run.was_computed["entropy-gradient"] == done.run.was_computed["first-order-u"] == len(NAMES)
    assert not any("sample" in stage or "score" in stage for stage in done.run.was_computed)


@pytest.mark.parametrize("keep", [True, False])
def test_the_plan_knows_what_is_computed_again(home, keep):
    asked = parse_config(config_of(home, home / ("kept" if keep else "dropped"), keep, importance={"etas": [0, 1, 2]}))
    steps = plan(asked, preflight(asked), Store(asked.store_root))
    planned = [step for step in steps if step.stage == "compute-update"]
    assert [step.cached for step in planned] == [keep] * len(NAMES)
    if not keep:
        assert planned[0].reasons == ("its vectors are not in the store, and importance would run",)
    assert {step.cached for step in steps if step.stage == "entropy-gradient"} == {True}


def lose(artifact: Path) -> None:
    shutil.rmtree(artifact / "vectors")


def lose_one(artifact: Path) -> None:
    next((artifact / "vectors").iterdir()).unlink()


def damage(artifact: Path) -> None:
    path = artifact / DIRECTION
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [lose, lose_one, damage])
def test_what_is_lost_or_damaged_is_noticed_where_it_is_needed(home, capsys, spoil):
    for folder in (home / "kept" / "compute-update").iterdir():
        spoil(folder)
    assert store_command(["store", "verify", "--artifacts", str(home / "kept")]) == 1
    assert capsys.readouterr().out.count("compute-update/") == len(NAMES)
    assert probe(config_of(home, home / "kept")).run.was_computed == {}  # nobody opens them
    done = probe(config_of(home, home / "kept", importance={"etas": [0, 1, 2]}))
    assert (
        done.run.was_computed.keys() == {"importance", "path-integral"} | STATISTICS
    )  # and, as there was one already,
    assert len(quarantined(Store(home / "kept"))) >= len(NAMES)  # compute-update, in the place of what was set aside
    assert store_command(["store", "verify", "--artifacts", str(home / "kept")]) == 0


def test_what_was_dropped_is_not_lost(home, capsys):
    assert store_command(["store", "verify", "--artifacts", str(home / "dropped")]) == 0
    assert "all sound" in capsys.readouterr().out
    (artifact,) = [a for a in Store(home / "dropped").ls() if a.stage == "compute-update"][:1]
    assert not of_store.present(artifact) and artifact.json
    with pytest.raises(StoreError, match=r"is not kept.*keep_vectors: false.*run the sweep again"):
        artifact.vector("direction")
    assert artifact.table("sequences.parquet").num_rows > 0


def test_a_step_that_comes_out_otherwise_is_not_mixed_with_what_it_was(home, monkeypatch, caplog):
    """Such as on another device: all that depends on it is computed again, too."""
    monkeypatch.setattr(taken_step, "clip_factor", lambda *_: 0.5)
    done = probe(config_of(home, home / "dropped", keep=False, importance={"etas": [0, 1, 2]}))
    assert caplog.text.count("compute-update gives other numbers than before, and all that depends on it") == len(NAMES)
    assert done.run.was_computed["first-order-e"] == 2 * len(NAMES)
    assert done.run.was_computed["importance"] == 2 * 2 * len(NAMES)
    assert all(row["clip_factor"] == 0.5 for row in done.rows)
    (kept,) = {a.digest for a in done.run.artifacts("compute-update")[-1:]}
    assert kept in {one["digest"] for one in done.run.artifacts("variance")[-1].manifest["upstream"]}


def test_an_archive_leaves_them_out_unless_told(home, tmp_path, capsys):
    for name, more in (("run.tar", []), ("all.tar", ["--all", "--with-vectors"])):
        assert (
            store_command(["store", "export", "latest", str(tmp_path / name), *more, "--artifacts", str(home / "kept")])
            == 0
        )
        assert store_command(["store", "import", str(tmp_path / name), "--artifacts", str(tmp_path / name[:3])]) == 0
        assert store_command(["store", "verify", "--artifacts", str(tmp_path / name[:3])]) == 0
    assert vectors_in(tmp_path / "run") == []
    assert vectors_in(tmp_path / "all") == vectors_in(home / "kept")
    done = probe(config_of(home, tmp_path / "all", importance={"etas": [0, 1, 2]}))
    assert done.run.was_computed.keys() == {"importance", "path-integral"} | STATISTICS


OPENED = """
import json, sys
from pathlib import Path
from entropy_core.report import figures
from entropy_core.config.schema import VarianceRequest
from entropy_core.execution import Execution
from entropy_core.pipeline.runner import direct_runner
from entropy_core.pipeline.statistics import variance
from entropy_core.store.store import Store
figures.figures = figures.token_figure = lambda *_: {}
figures.save_figure = lambda _, png, svg: svg.write_text("<svg/>")
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
store = Store(sys.argv[1])
request = VarianceRequest(artifacts=sys.argv[1], confidence_level=0.8)
variance(request, store, direct_runner(store, Execution()))
print(json.dumps([path for path in opened if path.startswith(sys.argv[1])]))
"""


def test_the_statistics_open_no_vector(home):
    """Every file that the process opens is counted; the libraries that open files by themselves are asked through
    `Artifact.path`, which reads what it verifies."""
    command = [sys.executable, "-c", OPENED, str(home / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    opened = json.loads(done.stdout.splitlines()[-1])
    assert any(path.endswith("tokens.safetensors") for path in opened)
    assert any("/compute-update/" in path for path in opened)
    assert not [path for path in opened if "/vectors/" in path or "/entropy-gradient/" in path]


def test_the_numbers_do_not_depend_on_the_blocks(home, monkeypatch):
    """What is elementwise to the bit; sums to the rounding of float64."""
    monkeypatch.setattr(vectors, "BLOCK", 100)
    done = probe(config_of(home, home / "new", update={"max_grad_norm": 1e-3}))
    monkeypatch.undo()
    skip_figures(monkeypatch)
    usual = probe(config_of(home, home / "kept", update={"max_grad_norm": 1e-3}))
    for a, b in zip(done.run.artifacts("compute-update"), usual.run.artifacts("compute-update"), strict=True):
        assert b.summary["clip_factor"] < 1
        assert a.summary["clip_factor"] == pytest.approx(b.summary["clip_factor"], rel=1e-14)
        for name in ("direction", "gradient"):
            for ours, theirs in zip(a.vector(name).values(), b.vector(name).values(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for row, other in zip(done.rows, usual.rows, strict=True):
        for name in ("delta_h1", "se_over_u", "inner_product", "delta_h1_momentum", "delta_h1_decay"):
            assert row[name] == pytest.approx(other[name], rel=1e-10)


def test_every_parameter_is_on_the_disk_by_its_name(origin):
    (artifact, *_) = [a for a in Store(origin / "kept").ls() if a.stage == "compute-update"]
    weights = load_file(origin / "run" / NAMES[0] / "model.safetensors")
    for name in ("direction", "gradient"):
        assert {n: t.shape for n, t in artifact.vector(name).items()} == {n: w.shape for n, w in weights.items()}
    assert isinstance(artifact, Artifact)
