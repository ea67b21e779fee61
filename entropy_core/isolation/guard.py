"""The two processes that a function of the user runs in: a guard, which watches, and its child, which calls.

    sweep ── guard ── child ── whatever the user's code starts

The guard is a fresh interpreter that has loaded little but psutil; the child is a fork of it, taken before there is a
thread or a lock. Every process that the user's code starts, and that outlives its parent, becomes a child of the guard
(on Linux), so that none is left when the guard ends. It ends when the child has answered, when a limit is passed, and
when the sweep is gone, which closes the lifeline. When the guard itself is killed, so is the child (on Linux).

All that the sweep is told goes through the guard: a line of JSON that says how the child ended and what it printed,
and then the bytes of the answer.
"""

import ctypes
import faulthandler
import hashlib
import importlib
import json
import os
import pickle
import resource
import secrets
import selectors
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from entropy_core.errors import ConfigError, ProbeError, one_line

STARTING = 300.0
"""Seconds until the libraries of the function that calls the user's are loaded; they do not count as the user's."""
LEAVING = 1.0
"""Seconds for the user's exit handlers and threads, once there is an answer."""
PRINTED = 64 * 1024**2
"""Bytes that may be printed."""
KEPT = 4096
"""Bytes that are kept of the first that is printed, and of the last."""

_ANEW = b"\xff" * 8  # in place of a length: the seconds count anew
_POLL, _LOOK = 0.02, 0.25  # seconds between looks at the child, and at all that it has started
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_CHILD_SUBREAPER = 1, 4, 36  # of Linux's prctl


class Task(NamedTuple):
    """What is to be called, and within which limits.

    Args:
        module: that the function is in.
        function: its name; called with `arguments`, it returns bytes, or yields parts of them.
        arguments: pickled.
        seconds: that the call may take, or each of its parts.
        memory: bytes that the child and what it starts may hold together.
        largest: bytes that the answer may have.
        parts: that it may have.
        sources: path → SHA-256 of our own code as the sweep has loaded it.
    """

    module: str
    function: str
    arguments: bytes
    seconds: float
    memory: float
    largest: int
    parts: int
    sources: dict[str, str]


class _Pipes(NamedTuple):
    """What a child says, each a descriptor to read from and one to write to."""

    answer: tuple[int, int]
    printed: tuple[int, int]


def main(lifeline: int) -> None:
    """Run the task that comes over stdin.

    Args:
        lifeline: a descriptor on which nothing comes but its end.
    """
    task = Task(*pickle.load(sys.stdin.buffer))
    _prctl(_SET_CHILD_SUBREAPER, 1)
    pipes, nonce, guard = _Pipes(os.pipe(), os.pipe()), secrets.token_bytes(16), os.getpid()
    child = os.fork()
    if child == 0:
        _call(task, pipes, nonce, guard)
        return
    _prctl(_SET_DUMPABLE, 0)  # of a user who is not root, nobody writes into our descriptors
    for _, write in pipes:
        os.close(write)
    try:
        end, answer = _Watch(task, child, lifeline, pipes, nonce).until_it_ends()
    finally:
        _end_all(child)
    sys.stdout.buffer.write(json.dumps(end).encode() + b"\n" + answer)
    sys.stdout.buffer.flush()


def _call(task: Task, pipes: _Pipes, nonce: bytes, guard: int) -> None:
    """In the child: call the function, and write what it returns."""
    os.setsid()
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # where the machine runs out of memory, this goes and not the sweep
    answer = _only_these_descriptors(pipes)
    faulthandler.enable(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    me, mark = os.getpid(), nonce
    try:
        function, arguments = getattr(importlib.import_module(task.module), task.function), pickle.loads(task.arguments)
        _require_the_same_code(task.sources)
        faulthandler.dump_traceback_later(task.seconds, file=2)
        os.write(answer, mark)  # from here on the seconds count
        mark, said = b"", b"+"
        made = function(*arguments)
        for part in [made] if isinstance(made, bytes) else made:
            said += part
            faulthandler.dump_traceback_later(task.seconds, file=2)
            os.write(answer, nonce + _ANEW)
    except ProbeError as error:
        texts = [text[:2000] for text in (error.fact, error.cause, error.fix)]
        said = b"!" + json.dumps([type(error).__name__, *texts]).encode()
    except BaseException as error:  # nothing that the user's code raises comes this far, unless it wants to
        said = b"!" + json.dumps(["", f"it failed with {type(error).__name__}: {one_line(error)}", "", ""]).encode()
    if os.getpid() != me:  # a fork that the user's code has made, and that came back
        os._exit(1)
    with suppress(Exception):
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
    rest = memoryview(mark + nonce + len(said).to_bytes(8, "little") + said)
    while rest:
        rest = rest[os.write(answer, rest) :]
    os.close(answer)


def _require_the_same_code(sources: dict[str, str]) -> None:
    """What is loaded here is read anew, and the key of a result holds the code that the sweep has loaded."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file in sources and hashlib.sha256(Path(file).read_bytes()).hexdigest() != sources[file]:
            raise ConfigError(f"{file} was edited while the sweep ran", fix="run the sweep again")


def _only_these_descriptors(pipes: _Pipes) -> int:
    """Nothing to read from stdin, stdout and stderr into a pipe; returns the descriptor of the answer, 3."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    answer = os.dup(pipes.answer[1])
    for source, target in ((nothing, 0), (pipes.printed[1], 1), (pipes.printed[1], 2)):
        os.dup2(source, target)
    os.dup2(answer, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    return 3


class _Watch:
    """Reads what a child says, and ends it where it does not end."""

    def __init__(self, task: Task, child: int, lifeline: int, pipes: _Pipes, nonce: bytes) -> None:
        self.task, self.child, self.nonce = task, child, nonce
        self.begins = 2 * len(nonce) + 8  # where the answer does
        self.status: int | None = None
        self.said, self.first, self.last, self.printed = bytearray(), bytearray(), bytearray(), 0
        self.deadline, self.look = time.monotonic() + STARTING, time.monotonic()
        self.started = self.orphaned = False
        self.parts = 0
        self.selector = selectors.DefaultSelector()
        for descriptor, name in ((lifeline, "lifeline"), (pipes.answer[0], "said"), (pipes.printed[0], "printed")):
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ, name)

    def until_it_ends(self) -> tuple[dict[str, Any], bytes]:
        """How it ended, and what it answered."""
        end = ""
        while not end:
            over = self._is_over()  # first, so that whatever it has said by then is read
            self._read(0.0 if over else _POLL)
            end = self._fault() or ("over" if over else "")
            if not end and self._answer() is not None:
                self._wait_for_its_end()
                end = "answered"
        answer = self._answer()
        if end == "over":
            end = "ended" if answer is None else "answered"
        printed = (self.first + self.last).decode(errors="replace")
        left_out = max(0, self.printed - 2 * KEPT)
        report = {"end": end, "status": self.status or 0, "printed": printed, "left_out": left_out}
        return report, (answer or b"") if end == "answered" else b""

    def _is_over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def _read(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            for _ in range(64):
                try:
                    data = os.read(key.fd, 65536)
                except BlockingIOError:
                    break
                if not data:
                    self.selector.unregister(key.fd)
                    self.orphaned |= key.data == "lifeline"
                    break
                self._note(key.data, data)

    def _note(self, name: str, data: bytes) -> None:
        if name == "said":
            self.said += data[: self.begins + self.task.largest - len(self.said)]  # what comes later is nobody's
            if not self.started and self.said.startswith(self.nonce):
                self.started, self.deadline = True, time.monotonic() + self.task.seconds + 0.25
            while self.said[len(self.nonce) : self.begins] == self.nonce + _ANEW and self.parts < self.task.parts:
                del self.said[len(self.nonce) : self.begins]
                self.parts, self.deadline = self.parts + 1, time.monotonic() + self.task.seconds + 0.25
        elif name == "printed":
            self.printed += len(data)
            room = KEPT - len(self.first)
            self.first += data[:room]
            self.last = (self.last + data[room:])[-KEPT:] if room < len(data) else self.last

    def _answer(self) -> bytes | None:
        """The whole answer, once it is there."""
        length = self._length()
        whole = length is not None and len(self.said) >= self.begins + length
        return bytes(self.said[self.begins : self.begins + (length or 0)]) if whole else None

    def _length(self) -> int | None:
        """How long the answer is, once that is there."""
        there = len(self.said) >= self.begins
        return int.from_bytes(self.said[self.begins - 8 : self.begins], "little") if there else None

    def _fault(self) -> str:
        """Which limit is passed; empty for none."""
        marks = 2 * self.nonce
        if self.orphaned:
            return "orphaned"
        if self.said[: len(marks)] != marks[: len(self.said)]:
            return "foreign"
        if (self._length() or 0) > self.task.largest:
            return "large"
        if self.printed > PRINTED:
            return "printed"
        if time.monotonic() > self.deadline:
            return "time" if self.started else "start"
        return "memory" if self.status is None and self._takes_too_much() else ""

    def _takes_too_much(self) -> bool:
        """Memory of the child often, and of all that it has started now and then."""
        with suppress(psutil.Error):
            child = psutil.Process(self.child)
            if child.memory_info().rss > self.task.memory:
                return True
            if time.monotonic() > self.look:
                before = time.monotonic()
                every = psutil.Process().children(recursive=True)
                if len(every) > 1 and sum(map(_resident, every)) > self.task.memory:
                    return sum(map(_own, every)) > self.task.memory  # what forks share counts once
                self.look = time.monotonic() + max(_LOOK, 20 * (time.monotonic() - before))
        return False

    def _wait_for_its_end(self) -> None:
        until = time.monotonic() + LEAVING
        while not self._is_over() and not self.orphaned and time.monotonic() < until:
            self._read(_POLL)
        self._read(0.0)


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def _own(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        found = process.memory_full_info()
        return getattr(found, "pss", found.uss)
    return 0


def _end_all(child: int) -> None:
    """Kill the child, its group, and whatever else has become the guard's."""
    with suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    for _ in range(500):
        left = psutil.Process().children(recursive=True)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.002)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
