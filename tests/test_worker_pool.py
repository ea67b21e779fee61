"""The pool of workers: who gets which stage, and how those wait who have to."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from worker_fixtures import compute_here, inputs_of

from entropy_core.execution import Execution
from entropy_core.pipeline import catalogue
from entropy_core.pipeline.threads import Threads
from entropy_core.store.store import Store
from entropy_core.workers import pool
from entropy_core.workers.pool import Pool
from entropy_core.workers.worker import Job

SCORE = catalogue.SCORE_E


def test_those_who_wait_do_not_wake_each_other(monkeypatch, tmp_path):
    """Each looks for a worker when it wakes: were the others woken by that, they would take a core among them."""
    workers = Pool([{}], compute_here, lambda *_: pytest.fail("a worker was started"))
    job = Job(tmp_path, "score-e-batch", "0" * 32, Execution(device="cpu", paths={}), inputs_of(tmp_path))
    looks, assign = [], workers._assign
    monkeypatch.setattr(workers, "_assign", lambda: (looks.append(None), assign()))

    def wait() -> None:
        with workers._seat(job):
            pass

    with ThreadPoolExecutor(3) as threads:
        with workers._seat(job):
            waiting = [threads.submit(wait) for _ in range(3)]
            time.sleep(1.0)
            busy = len(looks)
        for one in waiting:
            one.result()
    assert busy == 4  # each when it came


class Noted:
    """A process that notes what it is asked for and answers when it is told to."""

    def __init__(self, log: list[tuple[int, str]]) -> None:
        self.log, self.number = log, len({number for number, _ in log})

    def ask(self, method: str, job: Job, **_: Any) -> dict[str, str]:
        self.log.append((id(self), job.inputs["policy"].weights))
        time.sleep(0.01)
        return {"stage": job.stage, "key": job.key, "digest": "2" * 64}

    def close(self) -> None: ...
    def end(self) -> None: ...


def test_a_policy_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "_prove", lambda *_: None)
    log: list[tuple[int, str]] = []
    with Pool([{}] * 2, compute_here, lambda *_: Noted(log)) as workers:

        def chain(policy: str) -> None:
            for _ in range(20):
                workers.compute(Store(tmp_path), SCORE, Execution(), inputs_of(tmp_path, policy))

        Threads(2).all([partial(chain, "a"), partial(chain, "b")])
    assert sorted(policies_of(log)) == [["a"], ["b"]]


def policies_of(log: list[tuple[int, str]]) -> list[list[str]]:
    return [sorted({policy for of, policy in log if of == one}) for one in {of for of, _ in log}]


def test_a_worker_without_work_takes_that_of_another_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "_prove", lambda *_: None)
    monkeypatch.setattr(pool, "PATIENCE", 0.02)
    log: list[tuple[int, str]] = []
    with Pool([{}] * 2, compute_here, lambda *_: Noted(log)) as workers:
        call = partial(workers.compute, Store(tmp_path), SCORE, Execution())
        call(inputs_of(tmp_path, "a"))
        Threads(2).all([partial(call, inputs_of(tmp_path, "b"))] * 40)
    assert sorted(policies_of(log)) == [["a", "b"], ["b"]]


def test_the_longest_is_the_first(tmp_path, monkeypatch):
    workers = Pool([{}], compute_here, lambda *_: pytest.fail("no process"))
    policy = inputs_of(tmp_path)["policy"]
    waiting = [pool._Waiting(policy, seconds) for seconds in (1.0, 3.0, 2.0)]
    workers._waiting += waiting
    with workers._turn:
        workers._assign()
        assert [one.seat is not None for one in waiting] == [False, True, False]
        workers._free.append(workers._seats[0])
        workers._assign()
    assert [one.seat is not None for one in waiting] == [False, True, True]
