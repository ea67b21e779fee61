"""What computes the stages of a sweep, as its configuration has it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from entropy_core.config.schema import ExecutionConfig
from entropy_core.errors import ConfigError
from entropy_core.pipeline.runner import Compute
from entropy_core.pipeline.threads import Threads
from entropy_core.workers.counts import worker_count


class Workers(NamedTuple):
    """What computes stages.

    Attributes:
        compute: computes one; called as `Store.run` is, after the store.
        threads: in which it may be called.
    """

    compute: Compute
    threads: Threads


@contextmanager
def workers_of(config: ExecutionConfig, here: Compute) -> Iterator[Workers]:
    """Have what computes stages, within the context; then its processes end.

    Args:
        config: which workers, and how many.
        here: what computes a stage in a process.

    Raises:
        ConfigError: there are no such devices, or no such Ray.
    """
    if config.workers == "local":
        yield Workers(here, Threads())
        return
    from entropy_core.workers.pool import Pool

    if config.workers == "ray":
        from entropy_core.workers.ray_actors import ray_workers

        with ray_workers(config) as of_ray, Pool(of_ray.environments, here, of_ray.start) as pool:
            yield Workers(pool.compute, Threads(len(of_ray.environments)))
        return
    environments = environments_of(config)
    with Pool(environments, here) as pool:
        yield Workers(pool.compute, Threads(len(environments)))


def environments_of(config: ExecutionConfig) -> list[Mapping[str, str]]:
    """Return the environment variables of each worker: which device it sees, and how many threads it takes.

    Args:
        config: which workers, and how many.

    Raises:
        ConfigError: there are fewer devices.
    """
    import torch

    gpus = config.device != "cpu" and torch.cuda.is_available()
    if not gpus:
        if config.devices:
            raise ConfigError(
                f"execution.devices names {', '.join(config.devices)}, and stages are computed on the CPU",
                cause="execution.device is cpu, or torch finds no GPU",
                fix="leave it out, or run where there are GPUs",
            )
        count = config.worker_count or 1
        return [_threads_of_each(count)] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    there = visible if any(visible) else [str(index) for index in range(torch.cuda.device_count())]
    devices, each = config.devices or there, config.devices_per_policy
    count = worker_count(config, len(devices))
    groups = [",".join(devices[each * number : each * (number + 1)]) for number in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": group} | _threads_of_each(count) for group in groups]


def _threads_of_each(workers: int) -> dict[str, str]:
    """Share the cores among the workers, unless the user has said how many threads each process takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
