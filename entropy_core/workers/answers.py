"""What a worker and its driver say to each other, whatever carries it: the pipes of a process, or Ray.

The driver names a method of `Worker` and its arguments. The worker answers with lines of its log, with progress, and at
last with what the method returned or raised.
"""

import logging
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from entropy_core.errors import one_line
from entropy_core.pipeline.runner import Compute
from entropy_core.workers.worker import Worker

STARTING = 300.0
"""Seconds until the libraries of a worker are loaded."""

METHODS = ("identify", "find_token", "see_rename", "run")


class WorkerDied(Exception):
    """A worker has ended before it answered; says how."""


class Asked(Protocol):
    """A worker as its driver has it."""

    def ask(self, method: str, *arguments: Any, progress: Callable[[int, int], None] = ..., within: float = 0) -> Any:
        """Call a method of the worker. What it logs meanwhile is logged here.

        Args:
            method: one of `METHODS`.
            arguments: of the method, except a callable for progress.
            progress: called with what the worker tells of its progress.
            within: seconds for each sign of life; 0: as long as it takes.

        Returns:
            What the method returned.

        Raises:
            WorkerDied: the worker has ended, or gave no sign of life in time.
            Exception: what the method raised.
        """

    def end(self) -> None:
        """Kill the worker. Who waits for its answer gets `WorkerDied`."""

    def close(self) -> None:
        """Kill the worker and free what it took here, when nobody waits for its answer."""


Start = Callable[[Compute, Mapping[str, str]], Asked]
"""Starts a worker, given what runs a stage there, and variables of its environment."""


def heard(message: Callable[[], tuple[Any, ...]], progress: Callable[[int, int], None]) -> Any:
    """In the driver: hear a worker out.

    Args:
        message: waits for the next thing that it says.
        progress: called with what it tells of its progress.

    Returns:
        What the method returned.

    Raises:
        Exception: what the method raised.
    """
    while True:
        kind, *said = message()
        if kind == "returned":
            return said[0]
        if kind == "raised":
            raise said[0]
        if kind == "progress":
            progress(*said)
        else:
            name, level, text = said
            logging.getLogger(name).log(level, "%s", text)


class Answers:
    """In the worker: what answers its driver, in a process that has nothing else to do.

    Args:
        compute: what runs a stage in this process.
        say: called with each thing to say.
    """

    def __init__(self, compute: Compute, say: Callable[..., None]) -> None:
        self._worker, self._say = Worker(compute), say
        log = logging.getLogger("entropy_probe")
        log.handlers, log.propagate = [_Told(say)], False
        log.setLevel(logging.INFO)

    def answer(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Call a method of the worker, and say what it returned or raised.

        Args:
            method: one of `METHODS`.
            arguments: of the method.
        """
        try:
            said = "returned", self._called(method, arguments)
        except Exception as error:
            said = "raised", _that_travels(error)
        self._say(*said)

    def _called(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method not in METHODS:
            raise ValueError(f"{method!r} is nothing that a worker does")
        more = {"progress": lambda done, total: self._say("progress", done, total)} if method == "run" else {}
        return getattr(self._worker, method)(*arguments, **more)


class _Told(logging.Handler):
    """Tells the driver what is logged."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say("log", record.name, record.levelno, record.getMessage())


def _that_travels(error: Exception) -> Exception:
    """The error as the driver can read it, with the traceback in a note."""
    error.add_note("In the worker:\n" + "".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else RuntimeError(one_line(error))
    except Exception:  # libraries raise errors of all kinds
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
