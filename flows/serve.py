"""Serve the three deployments: `entropy-probe serve`, with a Prefect server at PREFECT_API_URL.

With `--work-pool NAME` they are registered there instead, for the workers of that pool to run.
"""

import argparse
import os
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import EntrypointType

from entropy_core.config.read import load_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import ProbeError
from entropy_core.pipeline.usable import read_settings
from flows.entropy_probe import checkpoint_sweep, interventions, variance
from flows.form import arranged, without_fixed
from flows.heartbeat import watch_heartbeats
from flows.service import FOLDER, ROOT
from flows.waiting import tell_those_that_wait


def deployments(config: Path | None, **where: Any) -> list[RunnerDeployment]:
    """Describe the deployments to Prefect.

    Args:
        config: a YAML file that fills in the form of the sweep; None for an empty form.
        where: arguments of `Flow.to_deployment` that name the work pool, if there is one.

    Returns:
        `checkpoint-sweep`, `variance` and `interventions`.

    Raises:
        ConfigError: the configuration is wrong.
    """
    chosen = _filled_in(load_config(config)) if config else {}
    made = [
        checkpoint_sweep.to_deployment(
            "checkpoint-sweep",
            description="Predict and measure what the next optimizer step does to the entropy, per checkpoint.",
            parameters={"config": chosen} if chosen else {},
            entrypoint_type=EntrypointType.MODULE_PATH,
            **where,
        ),
        variance.to_deployment(
            "variance",
            description="The statistics of a recorded sweep with other settings, from its cached batches alone.",
            parameters={"request": {"artifacts": chosen["execution"]["artifacts"]}} if chosen else {},
            entrypoint_type=EntrypointType.MODULE_PATH,
            **where,
        ),
        interventions.to_deployment(
            "interventions",
            description="What would change the entropy: interventions on the checkpoints of a recorded sweep.",
            parameters={"request": {"artifacts": chosen["execution"]["artifacts"]}} if chosen else {},
            entrypoint_type=EntrypointType.MODULE_PATH,
            **where,
        ),
    ]
    return [_with_form(deployment) for deployment in cast("list[RunnerDeployment]", made)]


def _with_form(deployment: RunnerDeployment) -> RunnerDeployment:
    """Arrange a deployment's form, and what it is filled in with."""
    schema = deployment._parameter_openapi_schema
    shown = {"properties": schema.properties}
    deployment.parameters = without_fixed(deployment.parameters or {}, shown, schema.definitions)
    schema.definitions = arranged(schema.definitions)
    return deployment


def _filled_in(config: ProbeConfig) -> dict[str, Any]:
    """What a form is filled in with: the settings of the file, and what it leaves to the checkpoints.

    A form posts everything that it shows, so that a default shown there would override the checkpoint's value. If the
    checkpoints cannot be read or probed, only the file's settings are filled in, and a run will say why.
    """
    try:
        return read_settings(config)[0].model_dump(mode="json")
    except ProbeError:
        return config.as_given()


def main(arguments: list[str] | None = None) -> None:
    """Register the deployments, and run their flow runs one at a time until interrupted."""
    parser = argparse.ArgumentParser(prog="entropy-probe serve", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--config", type=Path, help="a YAML file that fills in the form")
    parser.add_argument("--work-pool", default="", help="register the deployments for a pool of workers, and end")
    options = parser.parse_args(arguments)
    folder = os.environ.setdefault(FOLDER, os.getcwd())
    where: dict[str, Any] = {}
    if options.work_pool:
        here = {"env": {FOLDER: folder, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}  # as in `service.environment`
        where = {"work_pool_name": options.work_pool, "job_variables": here}
    registered = deployments(options.config, **where)
    ids = [cast("UUID", deployment.apply()) for deployment in registered]
    watch_heartbeats(ids)
    if not options.work_pool:
        tell_those_that_wait(ids)
        os.chdir(ROOT)
        serve(*registered, limit=1, pause_on_shutdown=False)
        return
    for deployment in registered:
        print(f"{deployment.flow_name}/{deployment.name} is run by the workers of {options.work_pool}.")


if __name__ == "__main__":
    main()
