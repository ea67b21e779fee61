"""The process of a worker: the end that the driver has, and the other.

Both speak through two pipes. The driver sends the name of a method of `Worker` and its arguments; the process answers
with lines of its log, with progress, and at last with what the method returned or raised. A process whose driver has
ended finds its pipe closed and ends at once, whatever it computes.
"""

import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from entropy_core.errors import one_line
from entropy_core.execution import Execution
from entropy_core.pipeline.runner import Compute
from entropy_core.workers.worker import Worker

STARTING = 300.0
"""Seconds until the libraries of a worker are loaded."""

METHODS = ("identify", "find_token", "see_rename", "run")

# -B: see `isolation.process`
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from entropy_core.workers.process import main; main(*map(int, sys.argv[1:]))"
)


class WorkerDied(Exception):
    """The process of a worker has ended before it answered; says how."""


class WorkerProcess:
    """A worker in a process of its own, which ends with this one.

    Args:
        process: the process, which runs `main`.
        jobs: the pipe that it reads from.
        answers: the pipe that it writes to.
        compute: what runs a stage there; a function at the top level of a module.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", jobs: Connection, answers: Connection, compute: Compute
    ) -> None:
        self._process, self._jobs, self._answers = process, jobs, answers
        self._send(compute)

    @classmethod
    def start(cls, compute: Compute, environment: Mapping[str, str]) -> "WorkerProcess":
        """Start a fresh process.

        Args:
            compute: what runs a stage there.
            environment: variables beside those of this process.

        Raises:
            OSError: the system starts no more processes.
        """
        their_jobs, jobs = os.pipe()
        answers, their_answers = os.pipe()
        ours = Connection(jobs, readable=False), Connection(answers, writable=False)
        path = [folder for folder in sys.path if isinstance(folder, str)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-B", "-c", _BOOT, json.dumps(path), str(their_jobs), str(their_answers)],
                stdin=subprocess.DEVNULL,
                pass_fds=[their_jobs, their_answers],
                env={**os.environ, "TQDM_DISABLE": "1", **environment},  # bars of several workers are no bars
                start_new_session=True,  # a Ctrl-C is for us
            )
        finally:
            os.close(their_jobs)
            os.close(their_answers)
        return cls(process, *ours, compute)

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def ask(
        self, method: str, *arguments: Any, progress: Callable[[int, int], None] = Execution.progress, within: float = 0
    ) -> Any:
        """Call a method of the worker. What it logs meanwhile is logged here.

        Args:
            method: one of `METHODS`.
            arguments: of the method, except a callable for progress.
            progress: called with what the worker tells of its progress.
            within: seconds for each sign of life; 0: as long as it takes.

        Returns:
            What the method returned.

        Raises:
            WorkerDied: the process has ended, or gave no sign of life in time.
            Exception: what the method raised.
        """
        self._send((method, arguments))
        while True:
            try:
                if within and not self._answers.poll(within):
                    self.end()
                    raise WorkerDied(f"it did not answer within {within:g} s")
                kind, *said = self._answers.recv()
            except (EOFError, OSError):
                raise WorkerDied(self._how_it_ended()) from None
            if kind == "returned":
                return said[0]
            if kind == "raised":
                raise said[0]
            if kind == "progress":
                progress(*said)
            else:
                name, level, text = said
                logging.getLogger(name).log(level, "%s", text)

    def _send(self, message: Any) -> None:
        try:
            self._jobs.send_bytes(pickle.dumps(message))
        except OSError:
            raise WorkerDied(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:  # it has closed its pipes
            self.end()
            return "it stopped answering"
        return f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"

    def end(self) -> None:
        """Kill the process, and wait for its end. Who waits for its answer gets `WorkerDied`."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the process and close the pipes, when nobody waits for its answer."""
        self.end()
        self._jobs.close()
        self._answers.close()


def main(jobs: int, answers: int) -> None:
    """Answer until the driver ends, in a fresh process.

    Args:
        jobs: descriptor from which to read.
        answers: descriptor to write to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader, writer, turn = Connection(jobs, writable=False), Connection(answers, readable=False), threading.Lock()

    def listen() -> None:
        while True:
            try:
                inbox.put(reader.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)

    def say(*message: Any) -> None:
        with turn:
            writer.send(message)

    threading.Thread(target=listen, daemon=True).start()
    log = logging.getLogger("entropy_probe")
    log.handlers, log.propagate = [_Told(say)], False
    log.setLevel(logging.INFO)
    worker = Worker(pickle.loads(inbox.get()))

    def answer(method: str, arguments: tuple[Any, ...]) -> Any:
        if method not in METHODS:
            raise ValueError(f"{method!r} is nothing that a worker does")
        more = {"progress": lambda done, total: say("progress", done, total)} if method == "run" else {}
        return getattr(worker, method)(*arguments, **more)

    while True:
        try:
            said = "returned", answer(*pickle.loads(inbox.get()))
        except Exception as error:
            said = "raised", _that_travels(error)
        say(*said)


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
