"""`watch` beside a real GRPO run that saves every second step and keeps two checkpoints; both are killed at any time.

Some minutes: `make chaos` runs it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from pipeline_fixtures import values
from watch_fixtures import becomes, rows_of

from entropy_core.files.run_folder import numbers_file
from entropy_core.store import runs
from entropy_core.store.store import Store

pytestmark = pytest.mark.chaos
pytest.importorskip("trl")

STEPS = 10
NAMES = [f"checkpoint-{step}" for step in range(2, STEPS + 1, 2)]
TESTS = Path(__file__).parent
KILLS = 12


def environment() -> dict[str, str]:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "agg"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_TELEMETRY": "1"}


def start(output: Path, *command: object) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        line = [sys.executable, *map(str, command)]
        return subprocess.Popen(line, cwd=output.parent, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def start_training(home: Path, *more: str) -> subprocess.Popen[bytes]:
    return start(home / "trainer.log", TESTS / "watch_trainer.py", home / "run", STEPS, *more)


def start_watch(home: Path, *more: object) -> subprocess.Popen[bytes]:
    watch = ["-m", "flows.cli", "watch", home / "run", "--config", home / "probe.yaml", "--every", "0.1"]
    return start(home / "watch.log", *watch, *more)


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    own = {"dataset_name": "arithmetic", "E_total_sequences": 16, "B_U": 4, "G": 4}
    asked = values(tmp_path / "run", tmp_path / "artifacts", checkpoints=["nowhere"], batch_config=own)
    asked["update"] = {"reward": f"{TESTS / 'trainer_rewards.py'}:low_digits", "leave_out": []}
    del asked["generation"]["max_new_tokens"]
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(asked))
    return tmp_path


def contents(root: Path) -> dict[tuple[str, str], str]:
    return {(artifact.stage, artifact.key): artifact.digest for artifact in Store(root).ls()}


def end(process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    try:
        assert process.wait(seconds) == 0, log.read_text()[-4000:]
    finally:
        process.kill()


def test_every_checkpoint_is_probed_and_none_refused(home):
    trainer = start_training(home)
    end(start_watch(home, "--keep"), home / "watch.log")
    end(trainer, home / "trainer.log")
    assert sorted(path.name for path in (home / "run").glob("checkpoint-*")) == sorted(NAMES[-2:])
    rows = rows_of(home / "artifacts")
    assert list(dict.fromkeys(row["checkpoint"] for row in rows)) == NAMES
    said = (home / "watch.log").read_text()
    assert "left out" not in said and "by links" in said


def test_kills_of_the_watcher_lose_nothing_and_change_nothing(home):
    """Kill it at random moments while the run goes on and afterwards: the same artifacts as without a kill."""
    trainer, chance, kills = start_training(home), random.Random(1), 0
    (home / "undisturbed").mkdir()
    assert becomes(lambda: (home / "run" / NAMES[0]).is_dir(), 300)
    while True:
        watcher = start_watch(home, "--keep")
        if kills < KILLS:
            try:
                watcher.wait(chance.uniform(3, 25))
            except subprocess.TimeoutExpired:
                watcher.send_signal(signal.SIGKILL)
                kills += 1
        else:
            watcher.wait(600)
        if watcher.wait(60) != -signal.SIGKILL:
            break
        assert all(Store(home / "artifacts").check(*name)[0] for name in Store(home / "artifacts").names())
    assert watcher.returncode == 0, (home / "watch.log").read_text()[-4000:]
    end(trainer, home / "trainer.log")
    probed = list(dict.fromkeys(row["checkpoint"] for row in rows_of(home / "artifacts")))
    (held,) = (home / "artifacts").glob("watch/*/held")
    assert sorted(path.name for path in held.iterdir()) == sorted(probed)
    assert probed[-2:] == NAMES[-2:]
    found = contents(home / "artifacts")

    shutil.copytree(held, home / "again")  # a sweep that nobody disturbs, of copies elsewhere
    config = yaml.safe_load((home / "probe.yaml").read_text())
    config["checkpoints"], config["execution"]["artifacts"] = [str(home / "again")], str(home / "undisturbed")
    (home / "again.yaml").write_text(yaml.safe_dump(config))
    end(start(home / "sweep.log", "-m", "flows.cli", "sweep", home / "again.yaml", "--direct"), home / "sweep.log")
    undisturbed = contents(home / "undisturbed")
    of_a_sweep = {"agreement", "report"}  # which are of all checkpoints together, as far as these were there
    assert {name: digest for name, digest in undisturbed.items() if name[0] not in of_a_sweep}.items() <= found.items()
    (run_id,) = runs.recorded(home / "undisturbed")
    rows = pq.read_table(runs.folder(home / "undisturbed", run_id) / "results.parquet").to_pylist()
    assert rows == rows_of(home / "artifacts")


def test_a_trainer_that_is_killed_in_a_save_is_taken_up_again(home):
    """The half-written checkpoint is not probed, and that of the training that goes on is."""
    watcher, trainer = start_watch(home), start_training(home)
    half = home / "run" / NAMES[1]
    while not half.is_dir() and trainer.poll() is None:
        time.sleep(0.0005)
    trainer.kill()
    trainer.wait()
    is_half = not (half / "trainer_state.json").exists()
    assert becomes(lambda: numbers_file(home / "run", NAMES[0]).exists(), 300), (home / "watch.log").read_text()
    time.sleep(1)
    if is_half:
        assert not numbers_file(home / "run", NAMES[1]).exists()
        assert not list((home / "artifacts").glob(f"watch/*/held/{NAMES[1]}"))
        shutil.rmtree(half)  # or else the trainer would begin with it, and fail
    resumed = start_training(home, "resume")
    end(watcher, home / "watch.log")
    end(resumed, home / "trainer.log")
    assert list(dict.fromkeys(row["checkpoint"] for row in rows_of(home / "artifacts"))) == NAMES
    assert is_half, "the kill came after the save: nothing was shown"
