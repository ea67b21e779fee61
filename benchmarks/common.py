"""What the benchmarks share: rows of the table, runs that take turns, peak memory in a process of its own."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table: what ours takes, what it is measured against, and the mark that the ratio is held to.

    Args:
        name: what is done.
        ours: measured, with its unit.
        against: the same of the other way, and which it is.
        ratio: ours over the other, or the other over ours where more is better.
        mark: such as "≤ 1.15"; empty where the row is for comparison only.
        reason: why the mark is missed; empty where it is not.
    """

    name: str
    ours: str
    against: str
    ratio: float
    mark: str = ""
    reason: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within its mark; None where there is none."""
        if not self.mark:
            return None
        sign, _, bound = self.mark.partition(" ")
        return self.ratio <= float(bound) if sign == "≤" else self.ratio >= float(bound)

    def because(self, why: Callable[[], str]) -> "Row":
        """The row; if it misses its mark, with the reason, which is looked for only then."""
        return replace(self, reason=why()) if self.holds is False else self


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call; on a GPU until it has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def take_turns(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, round by round: all run once in every round, so that what slows the machine slows all.

    Args:
        runs: by name; the first is run once before, unmeasured.
        rounds: how many.
        clock: what the seconds are by: that on the wall, or `time.process_time` for those of all threads.

    Returns:
        Name → seconds, one per round.
    """
    next(iter(runs.values()))()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run, clock))
    return taken


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def peak_megabytes(function: Callable[..., Run], *arguments: Any) -> float:
    """What a run needs beyond what is there before it: peak minus resident memory, in a process of its own.

    Args:
        function: makes the run in that process (loads the model, for one); the run is called once before it counts.
        arguments: of it.

    Returns:
        2²⁰ bytes; of the GPU where there is one.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {function.__name__} came to nothing") from None
    finally:
        process.join()


def _measure(pipe: Any, function: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    run = function(*arguments)
    run()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        pipe.send((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # or the run is given freed memory that counts as there before
    before_kb = status_kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    run()
    pipe.send((status_kilobytes("VmHWM") - before_kb) / 1024)


def status_kilobytes(name: str) -> int:
    """A line of /proc/self/status, such as `VmHWM`, the peak of the resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
