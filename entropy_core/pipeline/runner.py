"""Runners of stages, a parameter of the pipeline: a call in this process, a Prefect task, or a remote worker."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from entropy_core.execution import Execution
from entropy_core.pipeline.memory import run_within_memory
from entropy_core.pipeline.threads import Threads
from entropy_core.store.artifact import Artifact
from entropy_core.store.inputs import require_inputs
from entropy_core.store.store import Stage, Store

Inputs = dict[str, Any]
Compute = Callable[[Store, Stage, Any, Inputs], Artifact]
"""Computes a stage that is not in the store, such as `run_within_memory`, from its execution settings and inputs."""

_Result = TypeVar("_Result")
_Other = TypeVar("_Other")


class Runner:
    """Runs a stage or finds its cached result, after checking that the inputs match the stage's signature.

    Args:
        run: called as `run(stage, inputs, label)`; returns the artifact of this stage for these inputs. `label` is for
            display only.
        threads: in which it may be called at the same time; None: it is called by one thread at a time.
        part: called as `part(label, work)`; see the method of this name. None: the stages are shown as they come.
    """

    def __init__(
        self,
        run: Callable[[Stage, Inputs, str], Artifact],
        threads: Threads | None = None,
        part: Callable[[str, Callable[[], Any]], Any] | None = None,
    ) -> None:
        self._run, self.threads, self._part = run, threads or Threads(), part

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """Return the artifact of this stage for these inputs. Raises TypeError if they do not match its signature."""
        self.threads.go_on()
        require_inputs(stage, inputs)
        return self._run(stage, inputs, label)

    def map(self, stage: Stage, inputs: Sequence[Inputs], labels: Sequence[str]) -> list[Artifact]:
        """Run a stage for several independent inputs, such as the shards of a batch.

        A runner with several workers distributes them, and returns the artifacts in the order of the inputs.
        """
        return self.together(partial(self, stage, one, label) for one, label in zip(inputs, labels, strict=True))

    def together(self, parts: Iterable[Callable[[], _Result]]) -> list[_Result]:
        """Do several independent parts of a sweep, each of which may run any stages; see `Threads.all`."""
        return self.threads.all(list(parts))

    def both(self, one: Callable[[], _Result], other: Callable[[], _Other]) -> tuple[_Result, _Other]:
        """Do two independent parts of a sweep that return different things; see `together`."""
        first, second = self.together([one, other])
        return first, second  # type: ignore[return-value]

    def part(self, label: str, work: Callable[[], _Result]) -> _Result:
        """Call `work`, which runs the stages of a part of a sweep, such as a checkpoint: a reader sees them as one."""
        return self._part(label, work) if self._part else work()


def direct_runner(store: Store, execution: Execution) -> Runner:
    """Return a runner that calls the stages in this process."""
    return Runner(lambda stage, inputs, label: run_within_memory(store, stage, execution, inputs))
