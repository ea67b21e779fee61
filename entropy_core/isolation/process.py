"""Calls a function that runs code of the user in a process of its own, and believes nothing that comes back.

What that code may do wrong ends there: it may hang, crash, fill the memory, change torch's flags, the environment or
the working directory, ignore signals, or leave processes behind. It is a wall against accidents, and no jail: the code
runs as the user, with the user's files and network.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from entropy_core.errors import ConfigError, ProbeError

log = logging.getLogger("entropy_probe.user_code")

SLACK = 20.0
"""Seconds for what is not the user's: an interpreter to start, and the end of what was stopped."""

# -B: bytecode that is written here could be taken for that of a file that was edited within the same second
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from entropy_core.isolation.guard import main; main(int(sys.argv.pop(1)))"
)
_SHOWN = 2000


@dataclass(frozen=True)
class Isolation:
    """Limits of the user's code, and how it is called within them.

    Args:
        seconds: that a call may take, once our own libraries are loaded.
        gigabytes: of memory that it may hold, with all processes that it starts.
    """

    seconds: float = 600.0
    gigabytes: float = 16.0

    def __post_init__(self) -> None:
        _sources()

    def call(
        self,
        function: Callable[..., bytes | Iterator[bytes]],
        *arguments: Any,
        whose: str,
        file: str,
        error: type[ProbeError],
        largest: int,
        parts: int = 1,
    ) -> bytes:
        """Call a function of ours, which runs code of the user, in a process of its own.

        Args:
            function: at the top level of a module; raises ProbeError, and returns bytes that are not trusted. Where it
                calls the user's code several times, it yields a part of the bytes, or none, after each of them.
            arguments: that can be pickled.
            whose: what of the user it runs, for messages, such as "reward 'mine.py:f'".
            file: that the user's code is in; empty where there is none.
            error: raised where that code fails.
            largest: bytes that may come back.
            parts: that may be yielded; each has the seconds to itself.

        Returns:
            What the function returned, or what the user's code has put in its place: to be checked.

        Raises:
            ProbeError: of the type `error`, or ConfigError where the function raised that.
        """
        from entropy_core.isolation import guard  # its numbers; it loads psutil

        limits = self.seconds, self.gigabytes * 1e9, largest, parts
        task = (function.__module__, function.__qualname__, pickle.dumps(arguments), *limits, _sources())
        ended = _Ended(whose, file, error, self)
        waits = guard.STARTING + (1 + parts) * self.seconds + guard.LEAVING + SLACK
        try:
            status, out, complaint = _run(pickle.dumps(task), waits)
        except OSError as failure:
            raise error(
                f"no process can be started for {whose}: {failure.strerror}",
                cause="too many processes or open files, or too little memory",
                fix="end what else runs on this machine",
            ) from None
        line, _, answer = out.partition(b"\n")
        if not line:
            ended.without_report(status, complaint)
        return ended.answer_of(ended.report_of(line), answer)


@cache
def _sources() -> dict[str, str]:
    """Path → SHA-256 of each module of this package, as it was when this was first asked."""
    paths = Path(__file__).parents[1].rglob("*.py")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _run(task: bytes, seconds: float) -> tuple[int, bytes, bytes]:
    """Status, output and complaint of a guard; when this returns or raises, it has ended, or been killed."""
    read, write = os.pipe()  # the lifeline: closed, also by the end of this process, it ends the guard
    path = [folder for folder in sys.path if isinstance(folder, str)]  # as Python itself leaves others out
    try:
        guard = subprocess.Popen(
            [sys.executable, "-B", "-c", _BOOT, json.dumps(path), str(read)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[read],
            start_new_session=True,  # a Ctrl-C is for us
        )
    except BaseException:
        os.close(write)
        raise
    finally:
        os.close(read)
    try:
        out, complaint = guard.communicate(task, seconds)
    except subprocess.TimeoutExpired:  # it was stopped
        out, complaint = json.dumps({"end": "time", "status": 0, "printed": "", "left_out": 0}).encode(), b""
    finally:
        os.close(write)
        try:
            guard.wait(SLACK / 4)
        except subprocess.TimeoutExpired:
            guard.kill()  # and with it goes its child
            guard.wait()
        for stream in (guard.stdin, guard.stdout, guard.stderr):
            if stream is not None:
                stream.close()
    return guard.returncode, out, complaint


@dataclass(frozen=True)
class _Ended:
    """Says how a call ended."""

    whose: str
    file: str
    error: type[ProbeError]
    limits: Isolation

    def report_of(self, line: bytes) -> dict[str, Any]:
        """What the guard says; raises where it cannot have said it."""
        report: Any = None
        with suppress(ValueError, RecursionError):
            report = json.loads(line)
        kinds = {"end": str, "status": int, "printed": str, "left_out": int}
        if not isinstance(report, dict) or {name: type(value) for name, value in report.items()} != kinds:
            self.stopped("foreign", 0, "")
        return report

    def answer_of(self, report: dict[str, Any], answer: bytes) -> bytes:
        """The answer; raises where there is none, or where it is an error."""
        end, printed = report["end"], plain_text(report["printed"])
        left_out = f" (and {report['left_out']:,} bytes in between)" if report["left_out"] else ""
        if printed:
            shown = printed if len(printed) <= _SHOWN else f"{printed[: _SHOWN // 2]}\n…\n{printed[-_SHOWN // 2 :]}"
            level = logging.INFO if end == "answered" and answer[:1] == b"+" else logging.WARNING
            log.log(level, "%s printed%s:\n%s", self.whose, left_out, shown)
        if end != "answered":
            self.stopped(end, report["status"], printed)
        if answer[:1] != b"+":
            self.failed(answer[1:])
        return answer[1:]

    def stopped(self, end: str, status: int, printed: str) -> NoReturn:
        """Raise what a call that did not answer died of."""
        where = self._where(printed)
        if end == "start":
            raise self.error(
                f"the process that {self.whose} runs in did not begin in time", cause="a busy machine, or a slow disk"
            )
        if end == "time":
            raise self.error(
                f"{self.whose} took longer than {self.limits.seconds:g} s and was stopped{where}",
                cause="it waits for something, or does not end",
                fix="correct the function, or give it more time: execution.user_code_seconds",
            )
        if end == "memory":
            raise self.error(
                f"{self.whose} took more than {self.limits.gigabytes:g} GB of memory and was stopped{where}",
                cause="it loads something large, or keeps what it does not need",
                fix="correct the function, or give it more memory: execution.user_code_gigabytes",
            )
        if end == "printed":
            raise self.error(
                f"{self.whose} printed without end and was stopped", fix="print less; the log has how it begins"
            )
        if end == "foreign":
            raise self.error(
                f"{self.whose} wrote into the channel that its result is sent through",
                cause="it writes to a file descriptor that it has not opened",
                fix="print, or open a file",
            )
        if end == "large":
            raise self.error(f"{self.whose} returned more than was asked for", fix="return what the documentation says")
        self._died(status, where, printed)

    def _died(self, status: int, where: str, printed: str) -> NoReturn:
        last = f"; it printed at last: {printed.splitlines()[-1]:.200}" if printed and not where else ""
        if status < 0:
            name = _signal_name(-status)
            causes = {9: "the machine ran out of memory, or something killed it"}
            cause = causes.get(-status, "a library crashed, or a recursion went too deep")
            raise self.error(
                f"{self.whose} was killed by signal {name} before it returned{where}", cause=cause + last, fix=_CORRECT
            )
        raise self.error(
            f"{self.whose} ended its process with status {status} before it returned",
            cause="it calls os._exit, closes descriptors that it has not opened, or a library does" + last,
            fix=_CORRECT,
        )

    def failed(self, answer: bytes) -> NoReturn:
        """Raise the error that the function raised."""
        try:
            kind, *texts = json.loads(answer)
            fact, cause, fix = (" ".join(plain_text(text[:2000]).split()) for text in texts)
        except (ValueError, TypeError, AttributeError):
            self.stopped("foreign", 0, "")
        if not kind:
            raise self.error(f"{self.whose} ended its call: {fact}", fix=_CORRECT)
        raise (ConfigError if kind == "ConfigError" else self.error)(fact, cause=cause, fix=fix)

    def without_report(self, status: int, complaint: bytes) -> NoReturn:
        """Raise what became of a guard that said nothing."""
        text = plain_text(complaint.decode(errors="replace"))
        last = text.splitlines()[-1][:200] if text else ""
        how = f"was killed by signal {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        raise self.error(
            f"the process that {self.whose} runs in {how}" + (f": {last}" if last else ""),
            cause="the machine ran out of memory, or the function kills processes that are not its own",
            fix=_CORRECT,
        )

    def _where(self, printed: str) -> str:
        """The innermost line of the user's file in the stacks that Python prints when it dies, or is about to."""
        found = re.search(rf'File "({re.escape(self.file)})", line (\d+)', printed) if self.file else None
        return f", in {found[1]}:{found[2]}" if found else ""


_CORRECT = "correct the function"


def plain_text(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text).strip()


def _signal_name(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
