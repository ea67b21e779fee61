"""What a process of the chaos tests does; its parent, a fork server, has loaded all this, so that a kill is cheap."""

import os
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401
import safetensors.torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from entropy_core.config.read import parse_config
from entropy_core.errors import ProbeError
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.store.store import Store


def run_sweep(values: dict[str, Any], output: Path) -> None:
    """The whole sweep, from the configuration on; exits with 2 on an error that a user can act on."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        config = parse_config(values)
        checkpoints = preflight(config)
        store = Store(config.store_root)
        sweep(config, checkpoints, store, direct_runner(store, execution_for(config, checkpoints)))
    except ProbeError as error:
        print(error, flush=True)
        sys.exit(2)
