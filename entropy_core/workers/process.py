"""The process of a worker: the end that the driver has, and the other.

Both speak through two pipes; see `answers`. A process whose driver has ended finds its pipe closed and ends at once,
whatever it computes.
"""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from entropy_core.execution import Execution
from entropy_core.pipeline.runner import Compute
from entropy_core.workers.answers import Answers, WorkerDied, heard

# -B: see `isolation.process`
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from entropy_core.workers.process import main; main(*map(int, sys.argv[1:]))"
)


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
        """See `answers.Asked`."""
        self._send((method, arguments))

        def message() -> tuple[Any, ...]:
            try:
                if within and not self._answers.poll(within):
                    self.end()
                    raise WorkerDied(f"it did not answer within {within:g} s")
                said: tuple[Any, ...] = self._answers.recv()
                return said
            except (EOFError, OSError):
                raise WorkerDied(self._how_it_ended()) from None

        return heard(message, progress)

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
    answers_to = Answers(pickle.loads(inbox.get()), say)
    while True:
        answers_to.answer(*pickle.loads(inbox.get()))
