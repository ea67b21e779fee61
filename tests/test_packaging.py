"""`pip install .` of a clone into an empty environment, then a sweep from another folder. Run by `make test-sweep`.

The environment has nothing of its own; it sees the packages of the one that runs the tests, but not this project.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from demo_fixtures import ROOT, copy_of_the_demo_run

pytestmark = pytest.mark.sweep

PACKAGES = ("entropy_core", "flows", "tasks")
CONFIG = {
    "name": "packaged",
    "checkpoints": ["../runs/demo/checkpoint-6"],
    "batch_config": {"E_total_sequences": 32, "B_U": 4, "G": 4},
    "generation": {"max_new_tokens": 32},
    "update": {"reward": "reward.py:right"},
    "importance": {"etas": [0, 1]},
    "execution": {"shard_size": 16, "device": "cpu"},
}
REWARD = "def right(completions, answer, **_):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"


def run(command: list[object], folder: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PREFECT"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """What `pip install .` makes of a clone; the clone is gone afterwards."""
    folder = tmp_path_factory.mktemp("installed")
    clone, made = folder / "clone", folder / "environment"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    run([sys.executable, "-m", "venv", "--without-pip", made], folder)
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", made / "bin" / "python", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", clone], folder)
    expected = {path.relative_to(clone) for package in PACKAGES for path in (clone / package).rglob("*.*")}
    shutil.rmtree(clone)
    found = {path.relative_to(packages) for package in PACKAGES for path in (packages / package).rglob("*.*")}
    assert {path for path in found if "__pycache__" not in path.parts} == expected
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A user's folder; it has a package `flows` of its own, as projects that use Prefect do."""
    folder = tmp_path_factory.mktemp("project")
    copy_of_the_demo_run(folder / "runs" / "demo")
    (folder / "configs").mkdir()
    (folder / "configs" / "my-run.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "configs" / "reward.py").write_text(REWARD)
    for name in ("flows", "tasks"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('this is the package of the user')\n")
    return folder


def test_help_and_version(environment, tmp_path):
    command = environment / "bin" / "entropy-probe"
    assert "usage: entropy-probe" in run([command, "--help"], tmp_path)
    assert re.fullmatch(r"entropy-probe [\d.]+\n", run([command, "--version"], tmp_path))
    where = [environment / "bin" / "python", "-c", "import entropy_core; print(entropy_core.__file__)"]
    assert run(where, tmp_path).startswith(str(environment))


def test_the_demo_run_from_another_folder_with_and_without_prefect(environment, project):
    command = environment / "bin" / "entropy-probe"
    direct = run([command, "sweep", "configs/my-run.yaml", "--direct"], project)
    assert direct.count("\n  computed ") > 12 and "eta_over_lr" in direct  # a line for each stage
    store = project / "configs" / "artifacts"
    (results,) = store.glob("runs/packaged-*/results.parquet")
    rows = pq.read_table(results).to_pylist()
    assert {row["checkpoint"] for row in rows} == {"checkpoint-6"} and len(rows) == 8

    through_prefect = run([command, "sweep", "configs/my-run.yaml"], project)
    assert not re.search(r"^ *computed ", through_prefect, re.MULTILINE)
    assert re.search(r"^ *reused +\d\d stage runs: load-", through_prefect, re.MULTILINE)
    assert list(store.glob("runs/*/results.parquet")) == [results]
    table = direct[direct.index("\n\n") :]
    assert table.partition("\n\n/")[0] in through_prefect
    assert (store / "prefect" / "prefect.db").exists() and not (project / "artifacts").exists()
    assert left_behind(environment) == []

    fresh = project / "configs" / "fresh.yaml"
    fresh.write_text(yaml.safe_dump(CONFIG | {"execution": CONFIG["execution"] | {"artifacts": "../fresh"}}))
    computed = run([command, "sweep", fresh], project)
    assert (
        computed.count("\n  computed ") == direct.count("\n  computed ") and str(project / "fresh" / "runs") in computed
    )
    (again,) = (project / "fresh").glob("runs/packaged-*/results.parquet")
    assert pq.read_table(again).to_pylist() == rows
    assert left_behind(environment) == []


def test_the_other_commands(environment, project, tmp_path):
    command, store = environment / "bin" / "entropy-probe", project / "configs" / "artifacts"
    assert "0 would run" in run([command, "plan", project / "configs" / "my-run.yaml"], tmp_path)
    redone = run([command, "variance", "--confidence", ".5", "--direct"], project / "configs")
    assert re.findall(r"computed +(\S+)", redone) == ["variance", "report"]
    redone = run([command, "variance", "--confidence", ".6", "--artifacts", store], tmp_path)
    assert re.findall(r"computed +(\S+)", redone) == ["variance", "report"]
    assert re.search(r"^3 runs in ", run([command, "runs", "--artifacts", store], tmp_path), re.MULTILINE)
    assert "all sound" in run([command, "store", "verify", "--artifacts", store], tmp_path)
    assert left_behind(environment) == []


def left_behind(environment: Path) -> list[str]:
    """Processes of the environment that are still there."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(environment) in line]
