"""What runs a stage is a parameter of the pipeline: a call in this process, a Prefect task, a worker elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any

from entropy_core.execution import Execution
from entropy_core.pipeline.memory import run_within_memory
from entropy_core.store.artifact import Artifact
from entropy_core.store.inputs import require_inputs
from entropy_core.store.store import Stage, Store

Inputs = dict[str, Any]


class Runner:
    """Runs a stage, or finds its result; the stage is given what it says that it takes, or nothing is run.

    Args:
        run: called as `run(stage, inputs, label)`, returns the artifact of this stage for these inputs; `label` is for
            people.
    """

    def __init__(self, run: Callable[[Stage, Inputs, str], Artifact]) -> None:
        self._run = run

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """The artifact of this stage for these inputs. Raises TypeError where they are not its inputs."""
        require_inputs(stage, inputs)
        return self._run(stage, inputs, label)

    def map(self, stage: Stage, inputs: Sequence[Inputs], labels: Sequence[str]) -> list[Artifact]:
        """The same for inputs that do not depend on each other, such as the shards of a batch: here one by one.

        A runner with several workers hands them out, and returns the artifacts in the order of the inputs.
        """
        return [self(stage, of_one, label) for of_one, label in zip(inputs, labels, strict=True)]


def direct_runner(store: Store, execution: Execution) -> Runner:
    """A runner that calls the stages in this process."""
    return Runner(lambda stage, inputs, label: run_within_memory(store, stage, execution, inputs))
