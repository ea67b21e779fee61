"""Workers whose processes a fork server makes, which has loaded everything, so that a test can have many of them."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fork_server import fork_server
from pipeline_fixtures import values

from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Compute, Runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.pipeline.threads import Threads
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Store
from entropy_core.workers.process import WorkerProcess, main

Start = Callable[[Compute, Mapping[str, str]], WorkerProcess]


class Forked:
    """A process of a fork server, as `subprocess` shows one."""

    def __init__(self, process: Any) -> None:
        self._process, self.pid = process, process.pid

    def wait(self, seconds: float | None = None) -> int:
        """The exit status, once it has ended."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def answer(jobs: Any, answers: Any) -> None:
    """What a process does."""
    main(os.dup(jobs.fileno()), os.dup(answers.fileno()))


@pytest.fixture(scope="session")
def forked() -> Start:
    """What starts a worker."""
    context = fork_server()

    def start(compute: Compute, environment: Mapping[str, str]) -> WorkerProcess:
        their_jobs, jobs = context.Pipe(duplex=False)
        answers, their_answers = context.Pipe(duplex=False)
        process = context.Process(target=answer, args=(their_jobs, their_answers), daemon=True)
        process.start()
        their_jobs.close()
        their_answers.close()
        return WorkerProcess(Forked(process), jobs, answers, compute)  # type: ignore[arg-type]

    return start


def compute_here(store: Any, stage: Any, execution: Any, inputs: Any) -> Artifact:
    """What `direct_runner` does, without a slot for the device."""
    from entropy_core.pipeline.memory import run_within_memory

    return run_within_memory(store, stage, execution, inputs)


def swept(run: Path, root: Path, computing: Compute, threads: Threads) -> dict[tuple[str, str], str]:
    """Stage and key → digest of all artifacts of a sweep over two checkpoints."""
    config = parse_config(values(run, root, importance={"etas": [0, 0.5, 1]}))
    checkpoints = preflight(config)
    store = Store(root)
    execution = execution_for(config, checkpoints)
    asked = Runner(lambda stage, inputs, _: computing(store, stage, execution, inputs), threads)
    sweep(config, checkpoints, store, asked)
    return {(artifact.stage, artifact.key): artifact.digest for artifact in store.ls()}


def sleep(store: Any, stage: Any, execution: Any, inputs: Any) -> Artifact:
    """A stage that does not end."""
    execution.progress(1, 2)
    time.sleep(600)
    raise AssertionError


def die(store: Any, stage: Any, execution: Any, inputs: Any) -> Artifact:
    """A stage that takes its process along."""
    os._exit(3)


def inputs_of(root: Path, policy: str = "a") -> dict[str, Any]:
    """Inputs of score-e-batch, which nothing reads."""
    spec = PolicySpec(weights=policy, dtype="float32", attn_implementation="eager", temperature=1.0)
    return {"policy": spec, "sequences": Artifact("sample-e-batch", "0" * 32, "1" * 64, root)}
