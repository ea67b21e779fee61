"""What a reader is told while a sweep runs: a line for a stage, for a checkpoint, for all that was reused."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from entropy_core.pipeline.plan import Cost, Step
from entropy_core.pipeline.threads import Threads
from entropy_core.store.store import Stage
from flows import progress
from flows.progress import Progress


class World:
    """A clock that the stages advance, and what was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.lines, self.parts = 0.0, [], []
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(progress, "peak_rss_bytes", lambda: 2e9)

    def tell(self, line: str, part: float) -> None:
        self.lines.append(line)
        self.parts.append(part)

    def sweep(self, steps: list[Step], seconds: float = 3.0, costs: dict[str, Cost] | None = None, sequences: int = 0):
        """Go through a plan; a stage that is not cached takes some seconds."""
        told = Progress(steps, costs or {}, self.tell)
        left = list(steps)

        def run(stage: Any, inputs: Any, label: str) -> Any:
            step = left.pop(0) if left else Step(stage.name, label, False, ())
            assert (step.stage, step.label) == (stage.name, label)
            for done in range(sequences if not step.cached else 0):
                told.within(done, sequences)
                self.now += seconds / sequences
            if sequences and not step.cached:
                told.within(sequences, sequences)
            elif not step.cached:
                self.now += seconds
            created = "2020-01-01T00:00:00+00:00" if step.cached else datetime.now(UTC).isoformat()
            return SimpleNamespace(manifest={"created": created})

        run.threads, run.part = Threads(), lambda _, work: work()
        watched = told.watched(run)  # which is called as a runner is
        for step in steps:
            watched._run(Stage(step.stage, run), {}, step.label)
        return watched


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def steps(*named: tuple[str, str, bool]) -> list[Step]:
    return [Step(stage, label, cached, ()) for stage, label, cached in named]


def shards(stage: str, name: str, count: int, cached: int = 0) -> list[tuple[str, str, bool]]:
    return [(stage, f"{name} · shard {i}/{count}", i <= cached) for i in range(1, count + 1)]


def checkpoint(name: str, cached: bool) -> list[tuple[str, str, bool]]:
    return [("load-checkpoint", name, cached), *shards("score", name, 3, 3 if cached else 1), ("step", name, cached)]


def test_a_stage_has_one_line_over_its_shards_a_checkpoint_one_and_what_is_cached_one(world):
    world.sweep(
        steps(
            ("load-prompts", "pool train", True),
            *checkpoint("step-6", True),
            *checkpoint("step-60", False),
            ("variance", "step-6", True),
            ("variance", "step-60", False),
            ("report", "demo", False),
        )
    )
    assert world.lines == [
        "reused    6 stage runs: load-prompts, load-checkpoint, score, step",
        "computed  load-checkpoint · step-60  (3.0 s)",
        "reused    1 stage run: score",
        "computed  score · step-60  (2 of 3 parts, 6.0 s)",
        "computed  step · step-60  (3.0 s)",
        "measured  step-60, 2 of 2 checkpoints, in 12 s; about 6.0 s left",
        "reused    1 stage run: variance",
        "computed  variance · step-60  (3.0 s)",
        "computed  report · demo  (3.0 s)",
        "14 of 14 stages, in 18 s, with at most 2.0 GB of memory",
    ]
    assert world.parts == sorted(world.parts) and world.parts[-1] == 1


def test_all_of_it_cached_is_two_lines(world):
    world.sweep(steps(*checkpoint("step-6", True), ("report", "demo", True)))
    assert world.lines == [
        "reused    6 stage runs: load-checkpoint, score, step, report",
        "6 of 6 stages, in 0 s, with at most 2.0 GB of memory",
    ]


def test_a_long_stage_says_its_rate_and_the_time_left_over_all_shards(world):
    costs = {"report": Cost(30.0, 1.0)}
    world.sweep(steps(*shards("score", "a", 4), ("report", "demo", False)), 100.0, costs, sequences=100)
    first = world.lines[0]
    assert first == "score · a: 10 of 400 sequences, 1.0 a second, 390 s left; 0 of 5 stages, about 150 s left".replace(
        "390 s", "6 min"
    ).replace("150 s", "2 min")
    assert len([line for line in world.lines if line.startswith("score · a:")]) == 39
    assert any(
        line.startswith("score · a: 250 of 400 sequences, 1.0 a second, 2 min left; 2 of 5") for line in world.lines
    )
    assert "computed  score · a  (4 parts, 7 min)" in world.lines


def test_a_stage_that_a_repair_runs_again_is_told_and_not_counted(world):
    watched = world.sweep(steps(("score", "a", False), ("report", "demo", False)))
    watched._run(Stage("score", world.sweep), {}, "a")
    assert world.lines[-2:] == [
        "computed  score · a  (3.0 s)",
        "2 of 2 stages, in 9.0 s, with at most 2.0 GB of memory",
    ]
