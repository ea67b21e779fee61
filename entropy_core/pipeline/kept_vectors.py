"""Parameter-sized vectors during a sweep: recompute them if they are needed and missing, drop them when not needed."""

import logging
from collections.abc import Callable, Sequence
from threading import RLock
from typing import NamedTuple, TypeVar

from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store import vectors
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

log = logging.getLogger("entropy_probe.store")

_Result = TypeVar("_Result")


class OtherNumbers(Exception):
    """A recomputed artifact differs from the original, so results made from the original cannot be combined with it."""


class _Made(NamedTuple):
    stage: Stage
    inputs: Inputs
    label: str


class VectorKeeper(Runner):
    """Runs stages, and first recomputes the vectors that a stage opens if they are missing.

    Vectors are looked up only if a stage that opens them has to be computed; cached stages do not need them.

    Args:
        store: the store of the artifacts.
        run: the runner that executes stages.
        keep: whether vectors remain in the store after `release`.
    """

    def __init__(self, store: Store, run: Runner, keep: bool) -> None:
        super().__init__(run, run.threads)
        self._store, self._runner, self._keep = store, run, keep
        self._one_at_a_time = RLock()  # or else two stages would recompute the same vectors
        self._made: dict[Artifact, _Made] = {}

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """Return the artifact of this stage for these inputs; see `Runner`."""
        self._prepare(stage, inputs)
        return self._noted(self._runner(stage, inputs, label), _Made(stage, inputs, label))

    def map(self, stage: Stage, inputs: Sequence[Inputs], labels: Sequence[str]) -> list[Artifact]:
        """Return the artifacts of a stage for several inputs; see `Runner`."""
        for of_one in inputs:
            self._prepare(stage, of_one)
        found = zip(self._runner.map(stage, inputs, labels), inputs, labels, strict=True)
        return [self._noted(artifact, _Made(stage, of_one, label)) for artifact, of_one, label in found]

    def part(self, label: str, work: Callable[[], _Result]) -> _Result:
        """Call `work`; see `Runner`."""
        return self._runner.part(label, work)

    def _prepare(self, stage: Stage, inputs: Inputs) -> None:
        opened = stage.opened(inputs)
        if opened and self._store.find(stage.name, self._store.key(stage, inputs)) is None:
            with self._one_at_a_time:
                for artifact in opened:
                    self._require(artifact)

    def _noted(self, artifact: Artifact, made: _Made) -> Artifact:
        self._made[artifact] = made
        return artifact

    def release(self, artifact: Artifact) -> None:
        """Drop the vectors of an artifact, which the sweep no longer needs, unless they are to be kept."""
        if not self._keep:
            vectors.drop(self._store, artifact)

    def _require(self, artifact: Artifact) -> None:
        """Make sure that the store has the vectors of an artifact. Raises OtherNumbers if recomputing changes them."""
        if vectors.require(self._store, artifact):
            return
        log.info("%s/%s is computed again: its vectors are needed", artifact.stage, artifact.key[:12])
        stage, inputs, label = self._made[artifact]
        self._prepare(stage, inputs)
        again = self._runner(stage, inputs, label)
        if again != artifact:
            raise OtherNumbers(f"{label}: {stage.name} gives other numbers than before")
