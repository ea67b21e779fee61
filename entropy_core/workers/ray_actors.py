"""Workers as actors of Ray: of the cluster that `RAY_ADDRESS` names, else of a Ray of this machine's own.

A Ray of our own ends with the sweep. Its servers listen on 127.0.0.1 and admit nobody without a secret that is in no
file; it has no dashboard, and tells nobody that it is used.
"""

import os
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.config.schema import ExecutionConfig
from entropy_core.errors import ConfigError, one_line
from entropy_core.execution import Execution
from entropy_core.pipeline.runner import Compute
from entropy_core.workers.answers import Answers, Start, WorkerDied, heard
from entropy_core.workers.counts import worker_count

OBJECTS = 80 * 2**20
"""Bytes of Ray's object store, its least: artifacts go through the store of the sweep."""


class RayWorkers(NamedTuple):
    """What makes the workers of a sweep.

    Attributes:
        environments: variables of each.
        start: starts one.
    """

    environments: list[Mapping[str, str]]
    start: Start


@contextmanager
def ray_workers(config: ExecutionConfig) -> Iterator[RayWorkers]:
    """Have Ray within the context.

    Args:
        config: on which devices, and how many workers.

    Raises:
        ConfigError: the cluster cannot be reached, or has fewer devices.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    with _own_ray() if address in ("", "local") else _cluster(address):
        import ray

        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if config.device != "cpu" else 0
        if config.device == "cuda" and not gpus:
            raise ConfigError(
                "execution.device is cuda, and Ray has no GPU",
                fix="set execution.device: auto or cpu, or have Ray on machines with GPUs",
            )
        machines = sum(node["Alive"] for node in ray.nodes())
        count = worker_count(config, gpus) if gpus else config.worker_count or machines
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, int(there.get("CPU", 1)) // count)))
        environment = {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
        yield RayWorkers([environment] * count, partial(RayWorker.start, gpus=config.devices_per_policy if gpus else 0))


class RayWorker:
    """A worker as an actor, which ends with this process; see `answers.Asked`.

    Args:
        actor: handle of an `Actor`.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, compute: Compute, environment: Mapping[str, str], gpus: int) -> "RayWorker":
        """Ask Ray for a worker, which need not be there yet.

        Args:
            compute: what runs a stage there; a function at the top level of a module.
            environment: variables beside those of Ray's processes.
            gpus: that it has for itself; Ray chooses which.
        """
        import ray

        settings = {"num_gpus": gpus, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": dict(environment)}}
        return cls(ray.remote(Actor).options(**settings).remote(compute))

    def ask(
        self, method: str, *arguments: Any, progress: Callable[[int, int], None] = Execution.progress, within: float = 0
    ) -> Any:
        """See `answers.Asked`."""
        import ray

        try:
            said = self._actor.answer.remote(method, arguments)
        except ray.exceptions.RayError as error:
            raise WorkerDied(one_line(error)) from None

        def message() -> Any:
            try:
                if within and not ray.wait([said], timeout=within)[0]:
                    self.end()
                    raise WorkerDied(f"Ray has not started it, or it did not answer, within {within:g} s")
                return ray.get(next(said))
            except (ray.exceptions.RayError, StopIteration) as error:
                raise WorkerDied(one_line(error)) from None

        return heard(message, progress)

    def end(self) -> None:
        """Kill the actor. Who waits for its answer gets `WorkerDied`."""
        import ray

        ray.kill(self._actor)

    close = end


class Actor:
    """The other end, in a process of Ray's.

    Args:
        compute: what runs a stage there.
    """

    def __init__(self, compute: Compute) -> None:
        self._said: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._answers = Answers(compute, lambda *message: self._said.put(message))

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Call a method of the worker.

        Args:
            method: its name.
            arguments: of the method.

        Yields:
            Each thing that it says, as it says it.
        """
        threading.Thread(target=self._answers.answer, args=(method, arguments), daemon=True).start()
        kind = ""
        while kind not in ("returned", "raised"):
            kind, *_ = message = self._said.get()
            yield message


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Be a driver of a cluster that is there."""
    import ray

    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, the address of a Ray Client, and the sweep has to run on the cluster",
            fix="run it on a machine of the cluster with RAY_ADDRESS=auto",
        )
    try:
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except Exception as error:  # Ray has no type of its own for this
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and no Ray is found there: {one_line(error)}",
            cause="this machine is in no cluster, the cluster has ended, or another token is needed",
            fix="run `ray start` first, or leave RAY_ADDRESS out for a Ray on this machine alone",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray() -> Iterator[None]:
    """Have a Ray on this machine, for this process only."""
    if "ray" in sys.modules and not _token.cache_info().currsize:
        raise ConfigError(
            "Ray was loaded in this process before the sweep, with settings that would let others in",
            fix="run the sweep in a process of its own, or set RAY_ADDRESS to the cluster that it should use",
        )
    before = dict(os.environ)
    folder = Path(tempfile.mkdtemp(prefix="probe-ray-"))  # for this user only; a socket's path has to be short
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if isinstance(path, str)),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: it makes Ray's address that of this machine alone
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        import ray  # which reads some of these variables now

        with _signals_kept():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="WARNING",
                object_store_memory=OBJECTS,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
    except Exception as error:  # Ray has no type of its own for this
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"no Ray can be started on this machine: {one_line(error)}",
            cause="the machine is too busy, or the path of its folder for temporary files too long",
            fix="try again, set TMPDIR to a short path, or use workers: pool",
        ) from error
    finally:
        os.environ.clear()
        os.environ |= before
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _token() -> str:
    """The secret of this process, which Ray reads once, as it does most of its settings."""
    return secrets.token_hex(32)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our handlers, where Ray sets its own."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    handlers = {kind: signal.getsignal(kind) for kind in kinds}
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray sets none
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
