"""What is of the size of the policy, during a sweep: made again where it is needed and gone, let go where it is not."""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store import vectors
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

log = logging.getLogger("entropy_probe.store")


class OtherNumbers(Exception):
    """What was computed again for its vectors is not what it was: what was made from it cannot be used beside it."""


class _Made(NamedTuple):
    stage: Stage
    inputs: Inputs
    label: str


@dataclass
class VectorKeeper:
    """Sees to it that a stage finds the vectors it opens, whatever became of them since; a runner calls it.

    A vector is of the size of the policy. Nobody looks at it until a stage that opens it has to be computed; the stages
    that are cached do not need it any more.

    Args:
        store: where the artifacts are.
        run: runs a stage.
        keep: whether vectors stay in the store when the sweep is done with them.
    """

    store: Store
    run: Runner
    keep: bool
    _made: dict[Artifact, _Made] = field(default_factory=dict)

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """The artifact of this stage for these inputs; see `Runner`."""
        if stage.vectors and self.store.find(stage.name, self.store.key(stage, inputs)) is None:
            for name in stage.vectors:
                self._require(inputs[name])
        artifact = self.run(stage, inputs, label)
        self._made[artifact] = _Made(stage, inputs, label)
        return artifact

    def release(self, artifact: Artifact) -> None:
        """Say that the sweep is done with the vectors of an artifact."""
        if not self.keep:
            vectors.drop(self.store, artifact)

    def _require(self, artifact: Artifact) -> None:
        """Have the vectors of an artifact in the store, sound; raises OtherNumbers where they come out otherwise."""
        if vectors.require(self.store, artifact):
            return
        log.info("%s/%s is computed again: its vectors are needed", artifact.stage, artifact.key[:12])
        stage, inputs, label = self._made[artifact]
        again = self.run(stage, inputs, label)
        if again != artifact:
            raise OtherNumbers(f"{label}: {stage.name} gives other numbers than before")
