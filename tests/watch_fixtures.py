"""A run that is trained while it is watched: checkpoints that appear one after the other, and are rotated."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from pipeline_fixtures import SHAPE, save_checkpoint, train, values, write_reward

from entropy_core.demo.run import build_model
from entropy_core.store import runs

STEPS = (2, 4, 6)
NAMES = tuple(f"checkpoint-{step}" for step in STEPS)


def make_checkpoints(root: Path, steps: Sequence[int] = STEPS) -> Path:
    """Checkpoints of one training, the last of which says that it is over."""
    for step, optimizer in train(model := build_model(SHAPE), steps[-1]):
        if step in steps:
            directory = save_checkpoint(root / f"checkpoint-{step}", model, optimizer, step)
            state = {"global_step": step, "max_steps": steps[-1]}
            (directory / "trainer_state.json").write_text(json.dumps(state))
    return root


def save_again(checkpoint: Path, run: Path) -> Path:
    """Save a checkpoint as a trainer does: file by file, trainer_state.json last."""
    (run / checkpoint.name).mkdir(exist_ok=True)
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == "trainer_state.json"):
        shutil.copyfile(path, run / checkpoint.name / path.name)
    return run / checkpoint.name


def write_config(home: Path, run: Path, **sections: Any) -> Path:
    """A small configuration; its checkpoints are not those of the run that is watched."""
    asked = {"update": {"reward": write_reward(home)}, "checkpoints": ["nowhere"]}
    (home / "probe.yaml").write_text(yaml.safe_dump(values(run, home / "artifacts", **asked | sections)))
    return home / "probe.yaml"


@contextmanager
def trained(checkpoints: Path, run: Path, keep: int, until: Any) -> Iterator[None]:
    """Save one checkpoint after the other and delete all but the last `keep`, each time that `until(name)` is true."""
    failed: list[BaseException] = []

    def go() -> None:
        try:
            saved: list[Path] = []
            for path in sorted(checkpoints.iterdir()):
                saved.append(save_again(path, run))
                assert until(path.name)
                for old in saved[:-keep]:
                    shutil.rmtree(old)
                saved = saved[-keep:]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    yield
    thread.join()
    assert failed == []


def becomes(what: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether it becomes true before that time is over."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(what())


def rows_of(root: Path) -> list[dict[str, Any]]:
    """Of results.parquet of the only recorded run."""
    (run_id,) = runs.recorded(root)
    return pq.read_table(runs.folder(root, run_id) / "results.parquet").to_pylist()
