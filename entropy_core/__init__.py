"""Predict what the next optimizer step does to a policy's entropy, with intervals, and measure it.

`import entropy_core as probe` gives `probe.load_run`, the recorded runs of a store. Nothing is loaded before it is
used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_core.report.recorded_run import RecordedRun as RecordedRun
    from entropy_core.report.recorded_run import load_run as load_run

__all__ = ["RecordedRun", "load_run"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from entropy_core.report import recorded_run

    return getattr(recorded_run, name)
