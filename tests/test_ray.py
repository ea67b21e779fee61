"""Workers as actors of Ray, which differ from those of a pool by nothing but what carries their messages."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline_fixtures import call_here, make_run, skip_figures, values
from worker_fixtures import compute_here, swept

from entropy_core.config.read import parse_config
from entropy_core.config.schema import ExecutionConfig
from entropy_core.errors import ConfigError
from entropy_core.pipeline import preflight
from entropy_core.pipeline.threads import Threads
from entropy_core.workers.pool import Pool

CONFIG = ExecutionConfig(workers="ray", device="cpu", worker_count=2)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    config = parse_config(values(run, tmp_path / "store", execution={"workers": "ray"}))
    with pytest.raises(ConfigError, match=r"Ray is not installed.*Fix: pip install -e '.\[ray\]'"):
        preflight.preflight(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    if find_spec("ray") is None:  # not by loading it, which would be too early
        pytest.skip("the extra `ray` is not installed")
    return make_run(tmp_path_factory.mktemp("ray") / "run")


@pytest.fixture(scope="module")
def alone(run) -> Iterator[dict[tuple[str, str], str]]:
    """What is in the store of a sweep in this process."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        call_here(patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield swept(run, run.parent / "local", compute_here, Threads())


@pytest.fixture(scope="module")
def of_ray(run) -> Iterator[Any]:
    """A Ray of two workers."""
    from entropy_core.workers.ray_actors import ray_workers

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        with ray_workers(CONFIG) as workers:
            assert signal.getsignal(signal.SIGTERM) == handler
            assert not [name for name in os.environ if name.startswith("RAY_AUTH")]
            yield workers


def test_the_artifacts_are_those_of_one_process_and_a_killed_worker_is_replaced_alone(
    run, alone, of_ray, tmp_path, caplog
):
    """It is killed as it begins a stage of a sweep; nothing but that stage is run again."""
    caplog.set_level(logging.WARNING, "entropy_probe.workers")
    victims, started = ["first-order-e"], []

    def start(*arguments: Any) -> Any:
        worker = of_ray.start(*arguments)
        real = worker.ask

        def ask(method: str, *rest: Any, **options: Any) -> Any:
            if method == "run" and rest[0].stage in victims:
                victims.remove(rest[0].stage)
                os.kill(worker.pid, signal.SIGKILL)
            said = real(method, *rest, **options)
            worker.pid = said.process if method == "identify" else worker.pid
            return said

        worker.ask, worker.pid = ask, 0
        started.append(worker)
        return worker

    with Pool(of_ray.environments, compute_here, start) as workers:
        assert swept(run, tmp_path, workers.compute, Threads(2)) == alone
    assert victims == [] and len(started) == 3 and len({worker.pid for worker in started}) == 3
    [said] = [record.message for record in caplog.records]
    assert "is replaced, and first-order-e is run again" in said


def test_ray_listens_to_this_machine_only(of_ray):
    me, addresses = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            listening = [one for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
            addresses |= {one.laddr.ip.removeprefix("::ffff:") for one in listening}
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "said"), [("ray://127.0.0.1:1", "the address of a Ray Client"), ("auto", "no Ray is found there")]
)
def test_a_cluster_that_is_not_there_is_refused(run, monkeypatch, address, said):
    from entropy_core.workers.ray_actors import ray_workers

    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=said), ray_workers(CONFIG):
        pytest.fail("there is none")
