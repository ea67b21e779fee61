"""A process that preserves each complete checkpoint of a live run, by hard link or copy, until it is probed.

The trainer may delete a checkpoint (`save_total_limit`) soon after it is complete. A thread of the probing process
would compete for the GIL with the running stage at every file that it checks, and could come too late.

    python -m flows.holder RUN HELD PROBED EVERY PARENT    see `main`
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from entropy_core.checkpoints.holder import Holder


class HolderProcess:
    """The child process of `holding`; a thread starts it again whenever it has exited, also while a stage runs."""

    def __init__(self, run: Path, held: Path, probed: Path, every: float) -> None:
        self._arguments = [str(run), str(held), str(probed), str(every), str(os.getpid())]
        self._every, self._ending = every, threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "flows.holder", *self._arguments]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})

    def _keep_alive(self) -> None:
        while not self._ending.wait(self._every):
            if self._process.poll() is not None:
                with suppress(OSError):  # no memory for a process now, say: the next look tries again
                    self._process = self._start()

    def end(self) -> None:
        """Kill the process. A checkpoint that it is copying is not held: it gets its name only once it is whole."""
        self._ending.set()
        self._thread.join()  # it would start the process again
        self._process.kill()
        self._process.wait()


@contextmanager
def holding(run: Path, held: Path, probed: Path, every: float) -> Iterator[None]:
    """Hold what becomes complete, within the context.

    Args:
        run: the run directory.
        held: where to hold its checkpoints.
        probed: JSON file with the checkpoints that need not be held, see `Watched.remember`.
        every: seconds between two looks.
    """
    process = HolderProcess(run, held, probed, every)
    try:
        yield
    finally:
        process.end()


def main(run: str, held: str, probed: str, every: str, parent: str) -> None:
    """Hold checkpoints until the parent process has ended; the entry point of the child process.

    Args:
        run: the run directory.
        held: folder for the held checkpoints.
        probed: JSON file whose `probed` maps checkpoint names to digests, see `Watched`; it may not exist yet.
        every: seconds between two looks.
        parent: process id of the parent. Once it has ended, `getppid` is another, and the loop ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends this one

    def known() -> Mapping[str, str]:
        try:
            return json.loads(Path(probed).read_bytes())["probed"]
        except FileNotFoundError:
            return {}

    holder = Holder(Path(run), Path(held), known)
    while os.getppid() == int(parent):
        for line in holder.look():
            print(f"  {line}", flush=True)
        time.sleep(float(every))


if __name__ == "__main__":
    main(*sys.argv[1:])
