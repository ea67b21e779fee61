"""The fork server of a test process. It has loaded what its processes need, so that they begin in no time."""

import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

PRELOADED = [
    *("chaos_process", "worker_fixtures", "trainer_layouts"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.device_mesh", "torch.distributed.fsdp.wrap"),
]


@cache
def fork_server() -> ForkServerContext:
    """The context of its processes, once it has started; what it loads, it loads before the first of them."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        forkserver.ensure_running()
    return context
