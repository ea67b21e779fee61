"""One slot for each GPU: of several runs that want to compute on it at the same time, one does and the others wait.

Runs through Prefect and runs without it take turns with each other.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entropy_core.errors import StoreError
from entropy_core.pipeline.memory import run_within_memory
from entropy_core.pipeline.runner import Inputs
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

log = logging.getLogger("entropy_probe.device")


def device_name(device: str, number: int = 0) -> str:
    """Tell which GPU a stage computes on.

    Args:
        device: `cpu`, `cuda` or `auto`, as the configuration has it.
        number: which one, of a policy whose layers are on several.

    Returns:
        The GPU's own identity, whatever number it has in this process; empty for the CPU, which has no slots.
    """
    if device == "cpu":
        return ""
    import torch  # not needed to read this module, and slow to import

    return str(torch.cuda.get_device_properties(number).uuid) if torch.cuda.is_available() else ""


@contextmanager
def device_slot(name: str) -> Iterator[None]:
    """Hold the slot of a device; the system frees it if the process dies.

    It is taken inside a task, after Prefect has asked the store, so that what is cached does not queue.

    Args:
        name: of `device_name`; empty: there is nothing to wait for.
    """
    if not name:
        yield
        return
    lock = FileLock(_folder() / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waits for the GPU %s: another run computes on it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _folder() -> Path:
    """Where the slots are: for this user only, since whoever may write there can hold them, or make them links."""
    folder = Path(tempfile.gettempdir()) / f"entropy-probe-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreError(
            f"{folder} is not a folder of this user alone",
            cause="somebody else made it",
            fix="remove it, or set TMPDIR to a folder of your own",
        )
    return folder


def compute(store: Store, stage: Stage, execution: Any, inputs: Inputs) -> Artifact:
    """Run a stage that is not in the store; one that is given a policy computes on the device and waits for its slot.

    Args:
        store: where the artifact goes.
        stage: what to run.
        execution: how to compute; see `Store.run`.
        inputs: of the stage.
    """
    count = execution.devices_per_policy if "policy" in inputs else 0
    with ExitStack() as slots:
        for name in sorted({device_name(execution.device, number) for number in range(count)}):  # all in one order
            slots.enter_context(device_slot(name))
        return run_within_memory(store, stage, execution, inputs)
