"""Serve the two deployments: `python -m flows.serve`, with a Prefect server at PREFECT_API_URL."""

from pathlib import Path
from typing import cast

from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import EntrypointType

from entropy_core.config import load_config
from flows.entropy_probe import checkpoint_sweep, variance
from flows.heartbeat import watch_heartbeats

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def main() -> None:
    """Register the deployments and run what is asked for, one at a time, until interrupted."""
    watch_heartbeats()
    demo = load_config(DEMO).model_dump(mode="json")
    deployments = [
        checkpoint_sweep.to_deployment(
            "checkpoint-sweep",
            description="Predict and measure what the next optimizer step does to the entropy, per checkpoint.",
            parameters={"config": demo},
            entrypoint_type=EntrypointType.MODULE_PATH,
        ),
        variance.to_deployment(
            "variance",
            description="The statistics of a recorded sweep with other settings, from its cached batches alone.",
            entrypoint_type=EntrypointType.MODULE_PATH,
        ),
    ]
    serve(*cast("list[RunnerDeployment]", deployments), limit=1, pause_on_shutdown=False)


if __name__ == "__main__":
    main()
