"""Predict what the next optimizer step does to a policy's entropy, with intervals, and measure it.

`import entropy_core as probe` gives `probe.load_run`, a recorded run of a store, and `probe.compare`, how such runs
differ. Nothing is loaded before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_core.pipeline.comparison import Comparison as Comparison
    from entropy_core.pipeline.comparison import compare_runs as compare
    from entropy_core.report.recorded_run import RecordedRun as RecordedRun
    from entropy_core.report.recorded_run import load_run as load_run
    from entropy_core.report.recorded_run import recorded_runs as recorded_runs

__all__ = ["Comparison", "RecordedRun", "compare", "load_run", "recorded_runs"]

_WHERE = {
    "Comparison": ("pipeline.comparison", "Comparison"),
    "RecordedRun": ("report.recorded_run", "RecordedRun"),
    "compare": ("pipeline.comparison", "compare_runs"),
    "load_run": ("report.recorded_run", "load_run"),
    "recorded_runs": ("report.recorded_run", "recorded_runs"),
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
