"""A process that holds the complete checkpoints of a run, beside one that probes them.

It is a process of its own because a rotation may leave little time: a thread would wait for the lock of the interpreter
at every file that it looks at, as long as a stage computes.

    python -m flows.holder RUN HELD PROBED EVERY PARENT
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from entropy_core.checkpoints.holder import Holder


class HolderProcess:
    """The process, which is started again should it end."""

    def __init__(self, run: Path, held: Path, probed: Path, every: float) -> None:
        self._arguments = [str(run), str(held), str(probed), str(every), str(os.getpid())]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "flows.holder", *self._arguments]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})

    def see_to_it(self) -> None:
        """Start it again if it has ended."""
        if self._process.poll() is not None:
            self._process = self._start()

    def end(self) -> None:
        """End it; what is half-held is not used."""
        self._process.kill()
        self._process.wait()


@contextmanager
def holding(run: Path, held: Path, probed: Path, every: float) -> Iterator[HolderProcess]:
    """Hold what becomes complete, within the context.

    Args:
        run: the run directory.
        held: where to hold its checkpoints.
        probed: a file that says which were probed, see `Watched`.
        every: seconds between two looks.
    """
    process = HolderProcess(run, held, probed, every)
    try:
        yield process
    finally:
        process.end()


def main(run: str, held: str, probed: str, every: str, parent: str) -> None:
    """Look until the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent gets, too

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
