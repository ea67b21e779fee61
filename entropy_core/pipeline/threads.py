"""Make several calls that do not depend on each other, in threads if there are several workers to wait for."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

_Result = TypeVar("_Result")


class Abandoned(Exception):
    """Work was not begun because other work of the same sweep had failed; whoever waits for all raises that error."""


class Threads:
    """The threads of a sweep, which wait for its workers.

    Args:
        at_once: calls of one `all` that are under way at the same time; 1 makes them in order, in the caller's thread.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._lock = threading.Lock()
        self._open, self._failed = 0, False

    def all(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """Make all calls, which may themselves call `all`.

        Args:
            calls: functions without arguments. Each sees the context variables of the caller.

        Returns:
            What they return, in the order of the calls.

        Raises:
            Exception: that of the first call that failed. By then no other is under way: what was begun has ended, and
                the rest raised `Abandoned`. An interrupt is raised at once.
        """
        if self.at_once == 1 or len(calls) < 2:
            return [call() for call in calls]
        with self._lock:
            self._open += 1
        executor = ThreadPoolExecutor(min(self.at_once, len(calls)))
        try:
            futures = [executor.submit(contextvars.copy_context().run, self._unless_failed, call) for call in calls]
            wait(futures)
        except BaseException:  # the user's, who does not wait for what is under way
            self._failed = True
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        executor.shutdown()
        with self._lock:
            self._open -= 1
            if not self._open:
                self._failed = False  # what failed may be repaired, and the work done again
        return _results(futures)

    def _unless_failed(self, call: Callable[[], _Result]) -> _Result:
        self.go_on()
        try:
            return call()
        except BaseException:
            self._failed = True
            raise

    def go_on(self) -> None:
        """Raise `Abandoned` if another call has failed."""
        if self._failed:
            raise Abandoned


def _results(futures: Sequence[Future[_Result]]) -> list[_Result]:
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Abandoned)):
        raise error
    return [future.result() for future in futures]
