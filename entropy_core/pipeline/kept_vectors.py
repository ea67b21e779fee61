"""Parameter-sized vectors during a sweep: recompute them if they are needed and missing, drop them when not needed."""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store import vectors
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

log = logging.getLogger("entropy_probe.store")


class OtherNumbers(Exception):
    """A recomputed artifact differs from the original, so results made from the original cannot be combined with it."""


class _Made(NamedTuple):
    stage: Stage
    inputs: Inputs
    label: str


@dataclass
class VectorKeeper:
    """Runs stages, and makes sure that the parameter-sized vectors a stage opens are in the store.

    Vectors are looked up only if a stage that opens them has to be computed; cached stages do not need them.

    Args:
        store: the store of the artifacts.
        run: the runner that executes stages.
        keep: whether vectors remain in the store after `release`.
    """

    store: Store
    run: Runner
    keep: bool
    _made: dict[Artifact, _Made] = field(default_factory=dict)

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """Return the artifact of this stage for these inputs, like `Runner`."""
        if stage.vectors and self.store.find(stage.name, self.store.key(stage, inputs)) is None:
            for name in stage.vectors:
                self._require(inputs[name])
        artifact = self.run(stage, inputs, label)
        self._made[artifact] = _Made(stage, inputs, label)
        return artifact

    def release(self, artifact: Artifact) -> None:
        """Drop the vectors of an artifact that the sweep no longer needs, unless `keep` is set."""
        if not self.keep:
            vectors.drop(self.store, artifact)

    def _require(self, artifact: Artifact) -> None:
        """Recompute an artifact if its vectors are missing or damaged. Raises OtherNumbers if the result differs."""
        if vectors.require(self.store, artifact):
            return
        log.info("%s/%s is computed again: its vectors are needed", artifact.stage, artifact.key[:12])
        stage, inputs, label = self._made[artifact]
        again = self.run(stage, inputs, label)
        if again != artifact:
            raise OtherNumbers(f"{label}: {stage.name} gives other numbers than before")
