"""The three flows. What happens in which order is the pipeline's business; this is what Prefect makes of it.

The types of the parameters make the forms, and what a form cannot know is found here: a flow that validates for itself
says what is wrong on one line, and Prefect would on several.
"""

import logging
import os
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.states import Completed, State

from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.paths import Origin
from entropy_core.config.read import parse_config, parse_interventions, parse_request
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.errors import ConfigError, ProbeError
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline import sweep as pipeline
from entropy_core.pipeline.plan import plan, typical_costs
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.recorded import with_interventions
from entropy_core.store import runs
from entropy_core.store.store import Store
from entropy_core.workers.choice import workers_of
from flows.progress import Progress
from flows.results import RESULT, summary
from flows.service import FOLDER
from flows.ui import announce, introduce, publish, publish_plan
from tasks.device import compute
from tasks.stages import prefect_runner


def _without_traceback(record: logging.LogRecord) -> bool:
    """Let an error of the request into the log without its traceback: the message says it all."""
    if record.exc_info and isinstance(record.exc_info[1], ProbeError):
        record.exc_info = None
    return True


logging.getLogger("prefect.flow_runs").addFilter(_without_traceback)


@flow(name="entropy-probe", validate_parameters=False)
def checkpoint_sweep(config: ProbeConfig) -> State:
    """Predict what the next optimizer step does to the entropy of each checkpoint's policy, and measure it.

    Args:
        config: which checkpoints, which batches, which step sizes. Relative paths start at the folder in which the
            process that serves the deployment was started.

    Returns:
        A completed state that names the folder of the results; its result is the `SweepResult`.

    Raises:
        ProbeError: the request cannot be met; the message says why, and what to do.
    """
    folder = _folder()
    asked = parse_config(config, origin=Origin(folder))
    introduce("sweep", asked.name, [Path(pattern).name for pattern in asked.checkpoints])  # whatever is there
    return _swept(parse_config(config, origin=Origin(folder, must_exist=True)))


def _swept(config: ProbeConfig, rerun_of: str = "") -> State:
    checkpoints = preflight(config)
    kind, of = ("interventions", rerun_of) if rerun_of else ("sweep", config.name)
    introduce(kind, of, [checkpoint.name for checkpoint in checkpoints])
    store = Store(config.store_root)
    steps, costs = plan(config, checkpoints, store), typical_costs(store)
    progress = Progress(steps, costs, publish_plan(config.name, steps, costs))
    execution = pipeline.execution_for(config, checkpoints, progress.within)
    with workers_of(config.execution, compute) as workers:
        run = progress.watched(prefect_runner(store, execution, workers))
        result = pipeline.sweep(config, checkpoints, store, run, rerun_of)
    announce(result, config.name)
    return _published(result)


@flow(name="entropy-probe", validate_parameters=False)
def variance(request: VarianceRequest = VarianceRequest()) -> State:  # noqa: B008 (frozen)
    """Compute the statistics of a recorded sweep with other settings; needs neither checkpoints nor a device.

    Args:
        request: which sweep, which settings.

    Returns:
        As `checkpoint_sweep`.

    Raises:
        ProbeError: there is no such sweep, or a part of it is gone.
    """
    request = parse_request(request, Origin(_folder()))
    store = Store(request.artifacts)
    introduce("variance", runs.find(store.root, request.run).name)
    return _published(statistics.variance(request, store, prefect_runner(store, Execution())))


@flow(name="entropy-probe", validate_parameters=False)
def interventions(request: InterventionsRequest = InterventionsRequest()) -> State:  # noqa: B008 (frozen)
    """Try interventions on the checkpoints of a recorded sweep: which of them change what the next step does.

    Args:
        request: which sweep, which interventions. What the sweep computed is reused.

    Returns:
        As `checkpoint_sweep`.

    Raises:
        ProbeError: there is no such sweep, or its checkpoints are gone.
    """
    request = parse_interventions(request, Origin(_folder(), must_exist=True))
    return _swept(*with_interventions(request))


def _folder() -> Path:
    """Go to the folder in which the process that serves was started, as a run without Prefect would be there."""
    folder = os.environ.get(FOLDER, os.getcwd())
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be entered on this machine: {error.strerror}",
            cause="the deployments were registered in it, on another machine",
            fix="make it here, or register them in a folder that every machine has",
        ) from None
    return Path(folder)


def _published(result: statistics.SweepResult) -> State:
    publish(result)
    get_run_logger().info("%s\n%s", RESULT, summary(result.run_directory))
    return Completed(message=f"Results in {result.run_directory}", data=result)
