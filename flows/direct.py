"""A sweep in this process, for a node of a cluster: no server, no Prefect, a line for each stage."""

import logging
import time
from pathlib import Path

from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.read import load_config
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from flows.results import duration, print_results
from flows.terminal import PlainFormatter
from tasks.device import compute


def sweep(config_path: Path) -> int:
    """Run a checkpoint sweep and print its results.

    Args:
        config_path: a YAML file.

    Returns:
        The exit status.

    Raises:
        ProbeError: the sweep cannot be run; what was finished stays in the store.
    """
    log_to_the_terminal()
    return _sweep(load_config(config_path, must_exist=True))


def interventions(asked: InterventionsRequest) -> int:
    """Try interventions on the checkpoints of a recorded sweep and print the results.

    Args:
        asked: which sweep, which interventions.

    Returns:
        The exit status.

    Raises:
        ProbeError: there is no such sweep, or its checkpoints are gone.
    """
    from entropy_core.pipeline.recorded import with_interventions

    log_to_the_terminal()
    return _sweep(*with_interventions(asked))


def _sweep(config: ProbeConfig, rerun_of: str = "") -> int:
    from entropy_core.pipeline import sweep as pipeline  # a rerun of the statistics need not wait for these
    from entropy_core.pipeline.plan import plan, typical_costs
    from entropy_core.pipeline.preflight import preflight
    from entropy_core.workers.choice import workers_of
    from flows.plan import plan_total
    from flows.progress import Progress

    checkpoints = preflight(config)
    store = Store(config.store_root)
    steps, costs = plan(config, checkpoints, store), typical_costs(store)
    say(plan_total(steps, costs))
    progress = Progress(steps, costs, lambda line, _: say(line))
    execution = pipeline.execution_for(config, checkpoints, progress.within)
    with workers_of(config.execution, compute) as workers:
        asked = Runner(lambda stage, inputs, _: workers.compute(store, stage, execution, inputs), workers.threads)
        result = pipeline.sweep(config, checkpoints, store, progress.watched(asked), rerun_of)
    print_results(result.run_directory)
    return 0


def variance(asked: VarianceRequest) -> int:
    """Compute the statistics of a recorded sweep again and print the results.

    Args:
        asked: which sweep, which settings.

    Returns:
        The exit status.

    Raises:
        ProbeError: there is no such sweep, or a part of it is gone.
    """
    log_to_the_terminal()
    store = Store(asked.artifacts)
    print_results(statistics.variance(asked, store, terminal_runner(store, Execution())).run_directory)
    return 0


def terminal_runner(store: Store, execution: Execution) -> Runner:
    """Make a runner that computes in this process and prints a line for each stage.

    Args:
        store: where the artifacts are and go.
        execution: how to compute; see `Store.run`.
    """

    def run(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        started = time.monotonic()
        found = store.find(stage.name, store.key(stage, inputs))
        artifact = found or compute(store, stage, execution, inputs)
        seconds = duration(time.monotonic() - started)
        say(f"{'reused' if found else 'computed':9} {stage.name} · {label}  ({seconds})")
        return artifact

    return Runner(run)


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"  {line}", flush=True)


def log_to_the_terminal() -> None:
    """What the stages log goes to stderr; that one was computed is said already."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("  %(message)s"))
    log = logging.getLogger("entropy_probe")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    logging.getLogger("entropy_probe.store").setLevel(logging.WARNING)
