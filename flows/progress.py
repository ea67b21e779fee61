"""How far a sweep is, for whoever shows it: the terminal or Prefect's UI."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from entropy_core.pipeline.plan import Cost, Step
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store.artifact import Artifact
from entropy_core.store.manifest import peak_rss_bytes
from entropy_core.store.store import Stage
from flows.results import duration

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Says now and then how far a sweep is.

    Args:
        steps: of the plan, which the sweep takes in this order.
        costs: by stage, of earlier runs.
        tell: is given a line for a reader, and how much of the sweep is done, from 0 to 1.
    """

    def __init__(self, steps: Sequence[Step], costs: Mapping[str, Cost], tell: Callable[[str, float], None]) -> None:
        self._left = deque(steps)
        self._total, self._done = len(steps), 0
        self._seconds = {stage: cost.seconds for stage, cost in costs.items()}  # then what the last run of each took
        self._current = ""
        self._started = self._said = time.monotonic()
        self._tell = tell

    def watched(self, run: Runner) -> Runner:
        """Make a runner that does what `run` does and counts."""

        def watched_run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
            self._current = f"{stage.name} · {label}"
            started = time.monotonic()
            artifact = run(stage, inputs, label)
            if not self._left.popleft().cached:
                self._seconds[stage.name] = time.monotonic() - started
            self._done += 1
            self._say(f"{self._done} of {self._total} stages, {self._pace()}")
            return artifact

        return Runner(watched_run)

    def within(self, done: int, total: int) -> None:
        """Note that the stage under way has done `done` of its `total` parts."""
        if done < total:
            self._say(f"{self._current}: {done} of {total}")

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._said = now
            self._tell(line, self._done / self._total)

    def _pace(self) -> str:
        elapsed = time.monotonic() - self._started
        if not self._left:
            return f"in {duration(elapsed)}, with at most {peak_rss_bytes() / 1e9:.1f} GB of memory"
        per_minute = 60 * self._done / elapsed
        to_run = [step.stage for step in self._left if not step.cached]
        typical = mean(self._seconds.values()) if self._seconds else elapsed / self._done
        seconds = sum(self._seconds.get(stage, typical) for stage in to_run)
        return f"{per_minute:.{0 if per_minute > 10 else 1}f} a minute, about {duration(seconds)} left"
