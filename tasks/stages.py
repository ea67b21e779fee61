"""One thin Prefect task per stage: its name, its retries, its `Cached` state. What it computes the core knows."""

from collections.abc import Callable
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.exceptions import Pause
from prefect.transactions import CommitMode, transaction

from entropy_core.errors import MemoryShortageError
from entropy_core.pipeline.runner import Compute, Inputs, Runner
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from entropy_core.workers.choice import Workers
from tasks.artifact_cache import StoreStorage, cache_policy
from tasks.device import compute

RETRY_DELAYS = [5.0, 30.0]  # seconds: time for another process to leave the device, for a file server to come back


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Tell the failures that may pass by themselves from those that will not.

    Args:
        task: the task that failed.
        task_run: its run.
        state: the failed state, with the exception as its data.

    Returns:
        True for want of memory and for errors of the operating system, else False: any other `ProbeError` says what
        the user has to do, and trying again would only put that off.
    """
    return isinstance(state.data, (OSError, MemoryError, MemoryShortageError))


def stage_task(stage: Stage, store: Store, execution: Any, compute: Compute = compute) -> Task[..., Artifact]:
    """Make the task of a stage. The store decides whether it is `Cached`, Prefect's refresh switch included.

    Args:
        stage: any stage.
        store: where its artifacts are and go.
        execution: how to compute; see `Store.run`.
        compute: what computes it, here or in a worker.

    Returns:
        A task with two parameters: `inputs`, the stage's, among them artifacts of earlier stages, which become the
        arrows of the run graph; and `label`, what a reader calls this run, such as "checkpoint-20 · shard 3/16".
    """

    def run_stage(inputs: Inputs, label: str) -> Artifact:
        return compute(store, stage, execution, inputs)

    run_stage.__name__ = run_stage.__qualname__ = stage.name
    task = Task(  # without tags: for those Prefect asks the server for a slot before every run, a quarter of a second
        run_stage,
        name=stage.name,
        task_run_name=stage.name + " · {label}",
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=is_transient,
        persist_result=True,
        cache_policy=cache_policy(stage, store),
        cache_result_in_memory=False,
        refresh_cache=False,
    )
    task.result_storage = StoreStorage(store=store)  # the parameter takes only what the server has on record
    return task


def prefect_runner(store: Store, execution: Any, workers: Workers | None = None) -> Runner:
    """Make what the pipeline runs its stages with: one task run each, in as many threads as there are workers.

    A part of a sweep is a task run, too, around those of its stages: the graph shows it as one bar, which opens. It is
    not a flow run, since that would take a second of the server's time, and a run cannot be suspended in one.

    Args:
        store: where the artifacts are and go.
        execution: how to compute; see `Store.run`.
        workers: what computes the stages; None: this process.

    Returns:
        The runner, to be called inside a flow run.
    """
    of_stages, threads = workers or (compute, None)

    def run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        return stage_task(stage, store, execution, of_stages)(inputs=inputs, label=label)

    def part(label: str, work: Callable[[], Any]) -> Any:
        left: list[Pause] = []

        def run_part() -> Any:
            try:
                with transaction(commit_mode=CommitMode.EAGER):  # what is done stays done, whatever comes of the part
                    return work()
            except Pause as pause:  # Prefect would leave this task run as it is, Running for ever
                left.append(pause)
                return State(type=StateType.CANCELLED, name="Suspended")

        state = Task(run_part, name="checkpoint", task_run_name=label, cache_policy=NO_CACHE)(return_state=True)
        if left:
            raise left[0]
        return state.result()

    return Runner(run, threads, part)
