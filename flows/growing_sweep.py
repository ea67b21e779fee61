"""A recorded sweep that grows by one checkpoint at a time, and who is told of each."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import StoreError, one_line
from entropy_core.files.holding import digest_now
from entropy_core.files.run_folder import tell_numbers
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.recorded import read_run
from entropy_core.pipeline.runner import Compute, Inputs, Runner
from entropy_core.pipeline.watched import Watched, require_same_settings
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from entropy_core.workers.choice import workers_of
from flows.direct import say
from flows.numbers import numbers_of_each
from flows.reporters import Reporter
from flows.results import duration
from tasks.device import compute


class GrowingSweep:
    """The sweep over all checkpoints of a run that were probed so far.

    Args:
        config: of the sweep; its checkpoints are those that a later sweep of it finds.
        watched: which checkpoints there are, and what is remembered of this sweep.
        reporters: are told of each checkpoint once it is recorded.
    """

    def __init__(self, config: ProbeConfig, watched: Watched, reporters: Sequence[Reporter]) -> None:
        self.store = Store(config.store_root)
        self._config, self._watched = config, watched
        to_the_trainer = Reporter("trainer", partial(tell_numbers, watched.run), lambda: None)
        self._places = [to_the_trainer, *reporters]
        self._earlier: list[Inputs] = []
        if watched.sweep:
            try:
                self._earlier = read_run(self.store, watched.sweep)[2]
            except StoreError as error:
                say(f"begins a new sweep, with what is still there: {error}")
                watched.forget()
        self._forget_superseded()
        self._tell()

    def add(self, held: Path) -> None:
        """Probe a checkpoint, and record the sweep with it.

        Args:
            held: its directory, one of those that wait.

        Raises:
            ProbeError: it cannot be probed, or not beside the others.
        """
        started, digest = time.monotonic(), digest_now(held)
        checkpoints = preflight(self._config.model_copy(update={"checkpoints": [str(held)]}))
        require_same_settings(checkpoints, self._earlier)
        execution = replace(pipeline.execution_for(self._config, checkpoints), held=self._watched.held)
        with workers_of(self._config.execution, compute) as workers:
            run = Runner(_computing(self.store, execution, workers.compute), workers.threads)
            result = pipeline.sweep(self._config, checkpoints, self.store, run, earlier=self._earlier)
        self._earlier = read_run(self.store, result.run_id)[2]
        self._watched.probed(held, digest, result.run_id)
        self._forget_superseded()
        taken = duration(time.monotonic() - started)
        for numbers in self._numbers():
            if numbers["checkpoint"] == checkpoints[0].name:
                say(f"{_one_line(numbers)}  ({taken}; {result.run_directory / 'report.html'})")
        self._tell()

    def _numbers(self) -> list[dict[str, Any]]:
        table = runs.folder(self.store.root, self._watched.sweep) / "results.parquet"
        return numbers_of_each(pq.read_table(table).to_pylist())

    def _tell(self) -> None:
        """Tell every place of what it was not told yet; what it cannot take now is told with the next checkpoint."""
        if not self._watched.sweep:
            return
        for numbers in self._numbers():
            for place in self._places:
                told = self._watched.told.setdefault(place.name, [])
                if numbers["checkpoint"] in told:
                    continue
                try:
                    place.tell(numbers)
                except Exception as error:  # of a library of somebody else, or of a file server
                    say(f"{place.name} could not be told of {numbers['checkpoint']}, and will be: {one_line(error)}")
                    continue
                told.append(numbers["checkpoint"])
                self._watched.remember()

    def _forget_superseded(self) -> None:
        """Delete the record of the sweep before this one, which has nothing that this one has not."""
        if self._watched.superseded:
            folder = runs.folder(self.store.root, self._watched.superseded)
            with suppress(FileNotFoundError):
                (folder / runs.RECORD).unlink()
                shutil.rmtree(folder)
            self._watched.superseded = ""
            self._watched.remember()


def _computing(store: Store, execution: Any, compute: Compute) -> Callable[[Stage, Inputs, str], Artifact]:
    """What runs a stage and says so if it is computed; most of those of a sweep that grows are found."""

    def run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        if found := store.find(stage.name, store.key(stage, inputs)):
            return found
        started = time.monotonic()
        artifact = compute(store, stage, execution, inputs)
        say(f"computed {stage.name} · {label}  ({duration(time.monotonic() - started)})")
        return artifact

    return run


def _one_line(numbers: Mapping[str, Any]) -> str:
    def text(name: str) -> str:
        return "–" if numbers[name] is None else f"{numbers[name]:.4g}"

    return (
        f"{numbers['checkpoint']}: H {text('H')}, δH₁ {text('delta_h1')}, ΔH {text('delta_h')} at "
        f"{text('eta_over_lr')} × lr, {numbers['direction']}, {numbers['verdict']}"
    )
