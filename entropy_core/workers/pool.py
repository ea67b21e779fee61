"""A pool of workers: the stages that need a policy run in them, and all others here.

The cache is asked here, before a worker is. A worker is started when there is work for it and proves that it has the
same code and the same store; it keeps the policy of its last stage. What waits is given to the free worker that has its
policy, the longest first. A worker that dies is replaced, and the stage that it had in hand is run again.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition
from time import monotonic
from typing import Any

from entropy_core.errors import ProbeError, StoreError
from entropy_core.execution import Execution
from entropy_core.pipeline.runner import Compute, Inputs
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from entropy_core.workers.answers import STARTING, Asked, Start, WorkerDied
from entropy_core.workers.process import WorkerProcess
from entropy_core.workers.shared_store import require_shared
from entropy_core.workers.worker import Identity, Job, code_of_stages

log = logging.getLogger("entropy_probe.workers")

ATTEMPTS = 3
"""Workers that may die of the same stage."""
PATIENCE = 0.2
"""Seconds that a free worker keeps its policy for a stage to come, when only stages of another one wait."""


@dataclass(eq=False)
class _Seat:
    """A place for one worker, and its device."""

    number: int
    environment: Mapping[str, str]
    process: Asked | None = None
    policy: Any = None
    free_since: float = 0.0


@dataclass(eq=False)
class _Waiting:
    """A run of a stage that waits for a worker."""

    policy: Any
    seconds: float  # that this stage took before
    seat: _Seat | None = None


class Pool:
    """Computes stages in workers; to be closed, as a context manager.

    Args:
        environments: variables of each worker, such as that of its device.
        here: what computes a stage in a process.
        start: starts a worker: a process of this machine, or an actor of Ray.
    """

    def __init__(
        self, environments: Sequence[Mapping[str, str]], here: Compute, start: Start = WorkerProcess.start
    ) -> None:
        self._seats = [_Seat(number, variables) for number, variables in enumerate(environments, 1)]
        self._free = list(self._seats)
        self._here, self._start = here, start
        self._waiting: list[_Waiting] = []
        self._turn = Condition()
        self._seconds: dict[str, float] = {}
        self._models: set[str] = set()
        self._closed = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            for seat in self._seats:
                if seat.process:
                    (seat.process.close if seat in self._free else seat.process.end)()

    def compute(self, store: Store, stage: Stage, execution: Any, inputs: Inputs) -> Artifact:
        """Return the result of a stage, as `Store.run` does; may be called by several threads.

        Args:
            store: where the artifact is or goes.
            stage: what to run.
            execution: how to compute.
            inputs: of the stage.

        Raises:
            StoreError: a worker has other code, or another store.
            ProbeError: the workers of this stage died.
            Exception: what the stage raises.
        """
        if "policy" not in inputs:
            return self._here(store, stage, execution, inputs)
        key = store.key(stage, inputs)
        if found := store.check(stage.name, key)[0]:
            return found
        job = Job(store.root, stage.name, key, replace(execution, progress=Execution.progress), inputs)
        how = ""
        for _ in range(ATTEMPTS):
            with self._seat(job) as seat:
                try:
                    began = monotonic()
                    reference = self._process(seat, job).ask("run", job, progress=execution.progress)
                    self._seconds[stage.name] = monotonic() - began
                    return Artifact.from_dict(reference, store.root)
                except WorkerDied as died:
                    how = str(died)
                    if not self._closed:
                        log.warning("worker %d is replaced, and %s is run again: %s", seat.number, stage.name, how)
                    self._replace(seat)
        raise ProbeError(
            f"{ATTEMPTS} workers ended while they ran stage {stage.name}, of the last: {how}",
            cause="the system ran out of memory and killed them" if "SIGKILL" in how else "a library crashed",
            fix="set a lower execution.worker_count or generation.tf_batch_tokens, or run with workers: local",
        )

    @contextmanager
    def _seat(self, job: Job) -> Iterator[_Seat]:
        """Wait for a worker, and have it."""
        waiting = _Waiting(job.inputs["policy"], self._seconds.get(job.stage, float("inf")))
        with self._turn:
            self._waiting.append(waiting)
            self._assign()
            while waiting.seat is None and not self._closed:
                self._turn.wait(PATIENCE / 4 if self._free else None)
                self._assign()
            if waiting.seat is None or self._closed:
                raise StoreError("the workers of this sweep were ended", fix="run the sweep again")
            seat = waiting.seat
        try:
            yield seat
        finally:
            with self._turn:
                seat.free_since = monotonic()
                self._free.append(seat)
                self._assign()
                self._turn.notify_all()  # a worker that is still free keeps its policy a while: look by the clock

    def _assign(self) -> None:
        """Give what waits to free workers, and wake them only then: whoever waits calls this when it wakes."""
        assigned = False
        while self._free and self._waiting:
            changeable = monotonic() - PATIENCE
            pairs = [
                (seat, waiting)
                for waiting in self._waiting
                for seat in self._free
                if seat.policy in (None, waiting.policy) or seat.free_since < changeable
            ]
            if not pairs:
                break
            seat, waiting = max(pairs, key=self._merit)
            waiting.seat, seat.policy = seat, waiting.policy
            self._waiting.remove(waiting)
            self._free.remove(seat)
            assigned = True
        if assigned:
            self._turn.notify_all()

    def _merit(self, pair: tuple[_Seat, _Waiting]) -> tuple[Any, ...]:
        """Best is a worker with the policy; then a policy that none has, and a worker without one; then the longest."""
        seat, waiting = pair
        elsewhere = any(one.policy == waiting.policy for one in self._seats)
        return seat.policy == waiting.policy, not elsewhere, seat.policy is None, waiting.seconds

    def _process(self, seat: _Seat, job: Job) -> Asked:
        """Return the process of a worker, started and proved."""
        if seat.process is None:
            with self._turn:
                if self._closed:
                    raise WorkerDied("the sweep has ended")
                seat.process = self._start(self._here, seat.environment)
            try:
                self._prove(seat, seat.process, job)
            except ProbeError:
                self._replace(seat)
                raise
        return seat.process

    def _prove(self, seat: _Seat, process: Asked, job: Job) -> None:
        identity: Identity = process.ask("identify", job.execution.device, within=STARTING)
        whose = f"worker {seat.number} (process {identity.process} of {identity.host})"
        _require_same_code(whose, identity)
        require_shared(job.root, whose, partial(process.ask, within=STARTING))
        self._models.add(identity.device)
        if len(self._models) > 1:
            log.warning("the workers compute on %s, which round differently", " and ".join(sorted(self._models)))

    def _replace(self, seat: _Seat) -> None:
        if seat.process:
            seat.process.close()
        seat.process = seat.policy = None


def _require_same_code(whose: str, identity: Identity) -> None:
    ours = code_of_stages()
    other = [name for name, code in ours.items() if identity.code.get(name) != code]
    if other:
        libraries = {name: ours[name][1] != identity.code.get(name, ("", {}))[1] for name in other}
        raise StoreError(
            f"{whose} has other {'libraries' if any(libraries.values()) else 'code'} for {', '.join(other[:4])}",
            cause="the code was edited or a library upgraded after the sweep had begun, or it runs on another machine "
            "with another installation",
            fix="install the same on all machines, and run the sweep again: what is finished is reused",
        )
