"""Workers: the same artifacts with any number of them; what dies is replaced, and what does not fit is refused."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pipeline_fixtures import call_here, make_run, skip_figures
from worker_fixtures import Start, compute_here, die, inputs_of, sleep, swept

from entropy_core.config.schema import ExecutionConfig
from entropy_core.errors import ConfigError, ProbeError, StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline import catalogue
from entropy_core.pipeline.threads import Threads
from entropy_core.store.store import Store
from entropy_core.workers import pool, shared_store
from entropy_core.workers.choice import environments_of, workers_of
from entropy_core.workers.pool import Pool
from entropy_core.workers.worker import Job, Worker

SCORE = catalogue.SCORE_E


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("workers") / "run")


@pytest.fixture(scope="module")
def alone(run) -> Iterator[tuple[Path, dict[tuple[str, str], str]]]:
    """The store of a sweep in this process, and what is in it."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        call_here(patch)
        yield run.parent / "local", swept(run, run.parent / "local", compute_here, Threads())


# --- the same artifacts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_the_artifacts_are_the_same_with_any_number_of_workers(run, alone, tmp_path, forked: Start, count):
    with Pool([{}] * count, compute_here, forked) as workers:
        assert swept(run, tmp_path, workers.compute, Threads(count)) == alone[1]
        assert len({seat.process.pid for seat in workers._seats if seat.process}) == count


def test_what_is_there_needs_no_worker(run, alone):
    root, artifacts = alone
    with Pool([{}] * 2, compute_here, lambda *_: pytest.fail("a worker was started")) as workers:
        assert swept(run, root, workers.compute, Threads(2)) == artifacts


# --- what dies -------------------------------------------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_worker_that_is_killed_is_replaced_alone(run, alone, tmp_path, forked: Start, caplog, monkeypatch):
    """As it begins a stage of a sweep with two of them; nothing but that stage is run again."""
    caplog.set_level(logging.WARNING, "entropy_probe.workers")
    victims = ["first-order-e", "sample-e-batch"]
    started: list[int] = []

    def start(compute: Any, environment: Any) -> Any:
        process = forked(compute, environment)
        real = process.ask

        def ask(method: str, *arguments: Any, **options: Any) -> Any:
            if method == "run" and arguments[0].stage in victims:
                victims.remove(arguments[0].stage)
                process._process.kill()
            return real(method, *arguments, **options)

        monkeypatch.setattr(process, "ask", ask)
        started.append(process.pid)
        return process

    with Pool([{}] * 2, compute_here, start) as workers:
        assert swept(run, tmp_path, workers.compute, Threads(2)) == alone[1]
    assert victims == [] and len(started) == 4
    said = [record.message for record in caplog.records]
    assert sorted(line.split("replaced, and ")[1].split(":")[0] for line in said) == [
        "first-order-e is run again",
        "sample-e-batch is run again",
    ]
    assert all("SIGKILL" in line for line in said)


def test_a_stage_that_kills_every_worker_is_given_up(tmp_path, forked: Start):
    with (
        Pool([{}], die, forked) as workers,
        pytest.raises(ProbeError, match=r"3 workers ended while they ran stage score-e-batch, of the last: .*status 3"),
    ):
        workers.compute(Store(tmp_path), SCORE, Execution(device="cpu"), inputs_of(tmp_path))


def test_workers_end_with_the_pool_and_with_the_driver(tmp_path, forked: Start):
    """While they compute: one is killed when the pool is closed, the other finds that its pipes are."""
    store, execution = Store(tmp_path), Execution(device="cpu")
    begun: list[int] = []
    with ThreadPoolExecutor(1) as thread:
        with Pool([{}], sleep, forked) as workers:
            told = replace(execution, progress=lambda done, total: begun.append(done))
            waits = thread.submit(workers.compute, store, SCORE, told, inputs_of(tmp_path))
            until = time.monotonic() + 30
            while not begun and time.monotonic() < until:
                time.sleep(0.01)
            [pid] = [seat.process.pid for seat in workers._seats if seat.process]
        with pytest.raises(StoreError, match="the workers of this sweep were ended"):
            waits.result(30)
    assert begun == [1] and is_gone(pid)
    abandoned = forked(sleep, {})
    job = Job(tmp_path, SCORE.name, store.key(SCORE, inputs_of(tmp_path)), execution, inputs_of(tmp_path))
    abandoned._send(("run", (job,)))
    assert abandoned._answers.recv() == ("progress", 1, 2)
    abandoned._jobs.close()
    assert is_gone(abandoned.pid)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.attack("a worker is asked for something other than a stage of the catalogue")
def test_a_worker_runs_stages_of_the_catalogue_and_nothing_else(tmp_path, forked: Start):
    worker, execution, inputs = Worker(compute_here), Execution(), inputs_of(tmp_path)
    refused = [
        (Job(tmp_path, "remove-everything", "0" * 32, execution, inputs), StoreError, "is no stage"),
        (Job(tmp_path, SCORE.name, "0" * 32, execution, inputs), StoreError, "key of score-e-batch is another one"),
        (Job(tmp_path, SCORE.name, "0" * 32, execution, inputs | {"path": "x"}), TypeError, "path"),
    ]
    for job, kind, said in refused:
        with pytest.raises(kind, match=said):
            worker.run(job, progress=Execution.progress)
    process = forked(compute_here, {})
    with pytest.raises(ValueError, match="'_compute' is nothing that a worker does"):
        process.ask("_compute", "x")
    process.close()


@pytest.mark.attack("a worker has other code, another store, or does not see the locks and names of its sweep")
def test_other_code_is_refused_and_a_worker_of_the_same_code_takes_its_place(tmp_path, forked: Start, monkeypatch):
    ours = pool.code_of_stages()
    theirs = ours | {SCORE.name: ("0" * 64, ours[SCORE.name][1])}
    monkeypatch.setattr(pool, "code_of_stages", lambda: theirs)
    call = Store(tmp_path), SCORE, Execution(device="cpu"), inputs_of(tmp_path)
    with Pool([{}], compute_here, forked) as workers:
        with pytest.raises(StoreError, match=r"worker 1 \(process \d+ of .*\) has other code for score-e-batch"):
            workers.compute(*call)
        theirs[SCORE.name] = (ours[SCORE.name][0], {"torch": "1.0"})
        with pytest.raises(StoreError, match="has other libraries for score-e-batch"):
            workers.compute(*call)
        assert workers._seats[0].process is None
        theirs[SCORE.name] = ours[SCORE.name]
        with pytest.raises(ConfigError, match=r"is none of those that the sweep began with"):
            workers.compute(*call[:2], execution_without_paths(), call[3])


def execution_without_paths() -> Execution:
    from entropy_core.files.sources import Sources

    return Execution(device="cpu", paths=Sources())


def call_of_worker(name: str, *arguments: Any) -> Any:
    return getattr(Worker(compute_here), name)(*arguments)


def test_the_same_store_is_proved_and_leaves_nothing(tmp_path):
    shared_store.require_shared(tmp_path, "worker 1", call_of_worker)
    assert [path.name for path in (tmp_path / ".locks").rglob("*")] == ["workers"]


@pytest.mark.attack("a worker has other code, another store, or does not see the locks and names of its sweep")
def test_another_store_is_refused(tmp_path):
    def elsewhere(name: str, root: Path, *arguments: Any) -> Any:
        return call_of_worker(name, tmp_path / "elsewhere", *arguments)

    with pytest.raises(StoreError, match=r"worker 1 has another store at .*store.*same path"):
        shared_store.require_shared(tmp_path / "store", "worker 1", elsewhere)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.attack("a worker has other code, another store, or does not see the locks and names of its sweep")
def test_a_store_whose_locks_are_not_seen_by_all_is_refused(tmp_path, monkeypatch):
    def without_locks(name: str, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda *_: None)
            return call_of_worker(name, *arguments)

    with pytest.raises(StoreError, match=r"does not see the locks .* could be locked again.*Fix: have the store on"):
        shared_store.require_shared(tmp_path, "worker 1", without_locks)

    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    def locks_fail(name: str, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", fail)
            return call_of_worker(name, *arguments)

    with pytest.raises(StoreError, match=r"does not see the locks .* cannot be locked: No locks available"):
        shared_store.require_shared(tmp_path, "worker 1", locks_fail)


@pytest.mark.attack("a worker has other code, another store, or does not see the locks and names of its sweep")
@pytest.mark.parametrize("blind", ["find_token", "see_rename"])
def test_a_store_in_which_names_are_seen_late_is_refused(tmp_path, monkeypatch, blind):
    """By the driver, which waits for a file of the worker's; or by the worker, which waits for one of its."""
    monkeypatch.setattr(shared_store, "SECONDS", 0.1)

    def late(name: str, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            if name == blind:
                patch.setattr(Path, "rename", lambda *_: None)
                patch.setattr(shared_store, "_seen", lambda _: False)
            return call_of_worker(name, *arguments)

    with pytest.raises(StoreError, match=r"do not see within 0.1 s what the other has renamed"):
        shared_store.require_shared(tmp_path, "worker 1", late)
    assert [path.name for path in (tmp_path / ".locks").rglob("*")] == ["workers"]


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def devices(**settings: Any) -> list[str]:
    return [one.get("CUDA_VISIBLE_DEVICES", "") for one in environments_of(ExecutionConfig(workers="pool", **settings))]


def test_each_worker_has_a_device_and_its_part_of_the_cores(four_gpus, monkeypatch):
    assert devices() == ["0", "1", "2", "3"]
    assert devices(worker_count=2) == ["0", "1"]
    assert devices(devices=["3", "GPU-1f"]) == ["3", "GPU-1f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7")
    assert devices() == ["2", "7"]
    with pytest.raises(ConfigError, match="worker_count is 3, and there are 2 GPUs"):
        devices(worker_count=3)
    threads = [one["OMP_NUM_THREADS"] for one in environments_of(ExecutionConfig(workers="pool"))]
    assert threads == ["4", "4"]
    on_cpu = ExecutionConfig(workers="pool", device="cpu", worker_count=3)
    assert environments_of(on_cpu) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environments_of(on_cpu) == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7,4")
    assert devices(devices_per_policy=2) == ["2,7"]
    with pytest.raises(ConfigError, match="2 workers have 2 GPUs each, and there are 3 GPUs"):
        devices(worker_count=2, devices_per_policy=2)
    with pytest.raises(ConfigError, match="devices names 0, and stages are computed on the CPU"):
        devices(devices=["0"], device="cpu")


def test_a_pool_is_asked_for_before_its_settings():
    with pytest.raises(ValueError, match="workers is local"):
        ExecutionConfig(worker_count=2)
    with pytest.raises(ValueError, match="workers is local"):
        ExecutionConfig(devices=["0"])
    with pytest.raises(ValueError, match="Ray chooses which GPU"):
        ExecutionConfig(workers="ray", devices=["0"])
    with workers_of(ExecutionConfig(), compute_here) as workers:
        assert workers.compute is compute_here and workers.threads.at_once == 1
    with workers_of(ExecutionConfig(workers="pool", device="cpu", worker_count=2), compute_here) as workers:
        assert workers.threads.at_once == 2
