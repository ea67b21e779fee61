"""Kills of workers in the middle of a shard, and of the sweep that has them. Part of `make chaos`."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from attacks import in_place
from pipeline_fixtures import make_run, probe
from proofs import table
from test_chaos import PAGE, complete, contents, settings, unfinished
from worker_fixtures import Start, compute_here

from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.pipeline.threads import Threads
from entropy_core.store.store import Store
from entropy_core.workers.pool import Pool
from entropy_core.workers.process import WorkerDied

pytestmark = pytest.mark.chaos

KILLS, WORKERS = 20, 2
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of two checkpoints, and the store of a sweep in one process."""
    folder = tmp_path_factory.mktemp("chaos")
    make_run(folder / "run")
    probe(settings(folder, folder / "undisturbed"))
    return folder


class Killer:
    """Kills workers that have a stage in hand, at random moments; one for each stage, which is not given up then."""

    def __init__(self, start: Start) -> None:
        self._start, self._lock, self._chance = start, threading.Lock(), random.Random(7)
        self.in_hand: dict[Any, tuple[str, str]] = {}
        self.killed: dict[Any, tuple[str, str]] = {}
        self.died: list[tuple[str, str]] = []
        self.enough = False

    def start(self, *arguments: Any) -> Any:
        process = self._start(*arguments)
        real = process.ask

        def ask(method: str, *rest: Any, **options: Any) -> Any:
            if method != "run":
                return real(method, *rest, **options)
            with self._lock:
                self.in_hand[process] = rest[0].stage, rest[0].key
            try:
                return real(method, *rest, **options)
            except WorkerDied:
                self.died.append(self.in_hand[process])
                raise
            finally:
                with self._lock:
                    del self.in_hand[process]

        process.ask = ask
        return process

    def run(self) -> None:
        while not self.enough:
            time.sleep(self._chance.uniform(0.0, 0.8))
            with self._lock:
                spared = set(self.killed.values()) | self.killed.keys()
                victims = [process for process, job in self.in_hand.items() if not {process, job} & spared]
                if victims:
                    victim = self._chance.choice(victims)
                    os.kill(victim.pid, signal.SIGKILL)
                    self.killed[victim] = self.in_hand[victim]


def test_twenty_kills_of_workers_change_nothing(home, forked: Start, tmp_path):
    """A worker that is killed in a sweep is replaced in it; where a sweep ends, the next begins in an empty store."""
    expected, killer, sweeps = contents(home / "undisturbed"), Killer(forked), 0
    thread = threading.Thread(target=killer.run)
    thread.start()
    try:
        while len(killer.died) < KILLS:
            sweeps += 1
            root = tmp_path / f"sweep-{sweeps}"
            killer.killed.clear()
            made: dict[Path, tuple[int, int]] = {}
            config = parse_config(settings(home, root))
            checkpoints, store = preflight(config), Store(root)
            execution = execution_for(config, checkpoints)
            with Pool([{}] * WORKERS, compute_here, killer.start) as pool:

                def run(stage, inputs, _):
                    artifact = pool.compute(store, stage, execution, inputs)  # noqa: B023
                    before, seen = dict(made), complete(root)  # noqa: B023 (in this order: there are two threads)
                    assert before.items() <= seen.items(), "what was finished is neither lost nor computed again"
                    made.update(seen)  # noqa: B023
                    return artifact

                sweep(config, checkpoints, store, Runner(run, Threads(WORKERS)))
            assert contents(root) == expected
            assert [path.parent.name for path in unfinished(root)] in ([], ["runs"])
    finally:
        killer.enough = True
        thread.join()
    report(killer.died, sweeps)


def report(died: list[tuple[str, str]], sweeps: int) -> None:
    rows = sorted(Counter(stage for stage, _ in died).items())
    lines = [
        "# What the kill of a worker costs",
        "",
        f"Written by `make chaos`: {len(died)} times `kill -9` of one of {WORKERS} workers that had a stage in hand,",
        f"in {sweeps} sweeps over two tiny checkpoints. Each worker was replaced while its sweep went on, which ended",
        "with the digests of a sweep in one process; only the shard in hand was computed again.",
        "",
        *table(("killed in", "kills"), [(stage, str(count)) for stage, count in rows]),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    print(f"\n{text}")
    PAGE.write_text(in_place(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda by: by.name)
def test_no_process_is_left_behind_by_a_sweep_that_is_ended(home, tmp_path, by):
    """And the same command goes on where it was."""
    values = settings(home, tmp_path / "artifacts")
    values["execution"] |= {"workers": "pool", "worker_count": 2}
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "flows.cli", "sweep", str(config), "--direct"]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while len(workers := psutil.Process(sweep.pid).children()) < 2 or not unfinished(tmp_path / "artifacts"):
        assert sweep.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    sweep.send_signal(by)
    assert sweep.wait(30) != 0
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    before = complete(tmp_path / "artifacts")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before.items() <= complete(tmp_path / "artifacts").items()
    made = contents(tmp_path / "artifacts")
    assert made == contents(home / "undisturbed")
