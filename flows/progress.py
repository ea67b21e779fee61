"""How far a sweep is, for whoever shows it: the terminal or Prefect's UI."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean

from entropy_core.pipeline.plan import Cost, Step
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store.artifact import Artifact
from entropy_core.store.manifest import peak_rss_bytes
from entropy_core.store.store import Stage
from flows.results import duration
from flows.stage_lines import reused_line, stage_line, whole

_SECONDS_BETWEEN_LINES = 10.0
_LAST_STAGES = (
    "variance",
    "price",
    "phase",
    "rehearsal",
    "post-mortem",
    "interventions",
    "agreement",
    "report",
)  # of all checkpoints, after the last was measured


class Progress:
    """Says how far a sweep is: a line for each stage over all its shards, and for each checkpoint; cached ones folded.

    While a stage takes long, a line every ten seconds says how many of its sequences are done, how fast, and how long
    it and the sweep will take.

    Args:
        steps: of the plan.
        costs: by stage, of earlier runs.
        tell: is given a line for a reader, and how much of the sweep is done, from 0 to 1.
    """

    def __init__(self, steps: Sequence[Step], costs: Mapping[str, Cost], tell: Callable[[str, float], None]) -> None:
        self._steps, self._tell = steps, tell
        self._left = Counter((step.stage, step.label) for step in steps)
        self._to_run = Counter(step.stage for step in steps if not step.cached)
        self._parts = Counter((step.stage, whole(step.label)) for step in steps)
        self._seconds = {stage: cost.seconds for stage, cost in costs.items()}  # then what the last run of each took
        self._checkpoints = list(dict.fromkeys(step.label for step in steps if step.stage == "load-checkpoint"))
        self._of_checkpoint = Counter(name for step in steps if (name := self._checkpoint(step.stage, step.label)))
        self._computed_of = dict.fromkeys(self._checkpoints, 0)
        self._began_of: dict[str, float] = {}
        self._done = 0
        self._reused: list[str] = []
        self._under_way: dict[tuple[str, str], _Group] = {}
        self._here = threading.local()  # the group of the run that this thread waits for
        self._lock = threading.RLock()
        self._at_once = 1
        self._started = self._said = time.monotonic()

    def watched(self, run: Runner) -> Runner:
        """Make a runner that does what `run` does and tells of it."""
        self._at_once = run.threads.at_once

        def watched_run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
            began, started = datetime.now(UTC), time.monotonic()
            checkpoint = self._checkpoint(stage.name, label)
            with self._lock:
                group = self._here.group = self._group(stage.name, whole(label))
                self._began_of.setdefault(checkpoint, started)
            artifact = run(stage, inputs, label)
            fresh = datetime.fromisoformat(artifact.manifest["created"]) >= began
            with self._lock:
                self._note(group, label, fresh, time.monotonic() - started)
                if group.is_done:
                    self._close(group)
                if checkpoint:
                    self._note_checkpoint(checkpoint, fresh)
                if not self._left:
                    self._close_all()
                    self._fold()
                    self._say(f"{self._done} of {len(self._steps)} stages, {self._pace()}")
            return artifact

        return Runner(watched_run, run.threads, run.part)

    def within(self, done: int, total: int) -> None:
        """Note that the run of a stage that this thread waits for has done `done` of its `total` sequences."""
        with self._lock:
            group = self._here.group
            group.within[threading.get_ident()] = (done, total)
            if done < total and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
                self._fold()
                self._say(f"{group.progress()}; {self._done} of {len(self._steps)} stages, {self._pace()}")

    def _group(self, stage: str, of: str) -> "_Group":
        """The group that a run belongs to; where one runs at a time, it ends the one before."""
        if (stage, of) not in self._under_way:
            if self._at_once == 1:
                self._close_all()
            self._under_way[stage, of] = _Group(stage, of, self._parts[stage, of])
        return self._under_way[stage, of]

    def _note(self, group: "_Group", label: str, fresh: bool, seconds: float) -> None:
        stage, _ = group.name
        group.finish(fresh)
        if fresh:
            self._seconds[stage] = seconds
        else:
            self._reused.append(stage)
        if self._left[stage, label]:  # a repair runs a stage again
            self._done += 1
            self._left[stage, label] -= 1
            self._left = +self._left
            self._to_run[stage] -= 1

    def _close(self, group: "_Group") -> None:
        """Tell of a stage that was computed, once all its shards are done."""
        self._under_way.pop(group.name, None)
        if group.computed:
            self._fold()
            self._say(group.line())

    def _close_all(self) -> None:
        for group in list(self._under_way.values()):
            self._close(group)

    def _fold(self) -> None:
        if self._reused:
            self._say(reused_line(self._reused))
            self._reused = []

    def _note_checkpoint(self, checkpoint: str, fresh: bool) -> None:
        """Count a run of a stage of a checkpoint, and tell when the checkpoint is measured."""
        self._of_checkpoint[checkpoint] -= 1
        self._computed_of[checkpoint] += fresh
        if self._of_checkpoint[checkpoint] == 0 and self._computed_of[checkpoint]:
            self._fold()
            number, took = self._checkpoints.index(checkpoint) + 1, time.monotonic() - self._began_of[checkpoint]
            measured = f"measured  {checkpoint}, {number} of {len(self._checkpoints)} checkpoints, in {duration(took)}"
            self._say(f"{measured}; {self._pace()}")

    def _checkpoint(self, stage: str, label: str) -> str:
        """The checkpoint that a run of a stage measures; empty for what is of the whole sweep."""
        found = [name for name in self._checkpoints if f"{label} ".startswith(f"{name} ")]
        return max(found, key=len, default="") if stage not in _LAST_STAGES else ""

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        self._tell(line, self._done / len(self._steps))

    def _pace(self) -> str:
        elapsed = time.monotonic() - self._started
        if not self._left:
            return f"in {duration(elapsed)}, with at most {peak_rss_bytes() / 1e9:.1f} GB of memory"
        typical = mean(self._seconds.values()) if self._seconds else elapsed / max(self._done, 1)
        seconds = sum(count * self._seconds.get(stage, typical) for stage, count in self._to_run.items() if count > 0)
        return f"about {duration(seconds / self._at_once)} left"


class _Group:
    """The runs of one stage for all parts of one thing, such as the shards of E.

    Args:
        stage: name of the stage.
        of: what it is of.
        parts: how many runs there are.
    """

    def __init__(self, stage: str, of: str, parts: int) -> None:
        self.name, self.parts = (stage, of), parts
        self.done = self.computed = 0
        self.within: dict[int, tuple[int, int]] = {}  # thread → what its run has done, and all that it has to
        self._sequences = 0  # of the runs that were computed
        self._started = time.monotonic()

    @property
    def is_done(self) -> bool:
        return self.done >= self.parts

    def finish(self, fresh: bool) -> None:
        """Count a run that ended."""
        self.done += 1
        self.computed += fresh
        _, total = self.within.pop(threading.get_ident(), (0, 0))
        self._sequences += total if fresh else 0
        if not self.computed:
            self._started = time.monotonic()

    def progress(self) -> str:
        """How much of the whole stage is done, how fast it goes, and how long it still takes."""
        done, total = (sum(of_runs) for of_runs in zip(*self.within.values(), strict=True))
        seconds = time.monotonic() - self._started
        now = self._sequences + done
        left = total - done + total * (self.parts - self.done - len(self.within)) // len(self.within)
        rate = now / seconds
        pace = f", {rate:.{0 if rate > 10 else 1}f} a second, {duration(left / rate)} left" if now and seconds else ""
        return f"{' · '.join(self.name)}: {now} of {now + left} sequences{pace}"

    def line(self) -> str:
        """How the stage ended."""
        of_parts = f"{self.computed} of {self.parts}" if self.computed < self.parts else f"{self.parts}"
        detail = f"{of_parts} parts, " if self.parts > 1 else ""
        return stage_line("computed", *self.name, detail=f"{detail}{duration(time.monotonic() - self._started)}")
