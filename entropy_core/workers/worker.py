"""What a worker does for the driver of a sweep, in a process of a pool or as an actor: run stages of the catalogue."""

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.errors import StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline.catalogue import STAGES
from entropy_core.pipeline.runner import Compute, Inputs
from entropy_core.store.inputs import require_inputs
from entropy_core.store.store import Store, recipe_of
from entropy_core.workers import shared_store


class Job(NamedTuple):
    """A run of a stage.

    Attributes:
        root: of the store.
        stage: name of a stage of the catalogue.
        key: of the result.
        execution: how to compute, without what only the driver has.
        inputs: of the stage.
    """

    root: Path
    stage: str
    key: str
    execution: Execution
    inputs: Inputs


class Identity(NamedTuple):
    """Which worker it is, and what it computes with.

    Attributes:
        process: id of its process.
        host: name of its machine.
        device: model of its device.
        code: stage → digest of its code and releases of its libraries.
    """

    process: int
    host: str
    device: str
    code: Mapping[str, Any]


class Worker:
    """Runs stages, one at a time.

    Args:
        compute: what runs a stage in this process.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._within_memory: dict[str, Execution] = {}  # what one stage has found out about the device, the next knows
        self._stages = {stage.name: stage for stage in STAGES}

    def identify(self, device: str) -> Identity:
        """Say which worker this is.

        Args:
            device: as the execution settings have it.
        """
        return Identity(os.getpid(), platform.node(), device_model(device), code_of_stages())

    def find_token(self, root: Path, token: str) -> tuple[str, str]:
        """See `shared_store.find_token`."""
        return shared_store.find_token(root, token)

    def see_rename(self, root: Path, token: str) -> bool:
        """See `shared_store.see_rename`."""
        return shared_store.see_rename(root, token)

    def run(self, job: Job, progress: Callable[[int, int], None]) -> dict[str, str]:
        """Run a stage, or find its result.

        Args:
            job: what to run.
            progress: called with (done, total) as the stage advances.

        Returns:
            Reference to the artifact; see `Artifact.to_dict`.

        Raises:
            StoreError: there is no such stage, or what makes its result is not the same here as for the driver.
            Exception: what the stage raises.
        """
        stage, store = self._stages.get(job.stage), Store(job.root)
        if stage is None:
            raise StoreError(f"{job.stage!r} is no stage that a worker runs", fix="run a stage of the catalogue")
        require_inputs(stage, job.inputs)
        if store.key(stage, job.inputs) != job.key:
            raise StoreError(
                f"the key of {job.stage} is another one in the worker",
                cause="the code or a library was changed since the sweep had begun",
                fix="run the sweep again",
            )
        execution = replace(job.execution, progress=progress, within_memory=self._within_memory)
        return self._compute(store, stage, execution, job.inputs).to_dict()


def code_of_stages() -> dict[str, Any]:
    """Stage → digest of its code and releases of its libraries, of all stages, in this process."""
    recipes = {stage.name: recipe_of(stage, {}) for stage in STAGES}
    return {name: (recipe["code"], recipe["libraries"]) for name, recipe in recipes.items()}


@cache
def device_model(device: str) -> str:
    """Model of the device that a stage computes on in this process, such as "NVIDIA H100"."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
