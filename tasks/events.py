"""The event of a probed checkpoint, for the automations of a Prefect server."""

from collections.abc import Mapping
from typing import Any

from prefect.events import emit_event

PROBED = "entropy-probe.checkpoint.probed"


def checkpoint_probed(run: str, numbers: Mapping[str, Any], flow_run: str = "") -> None:
    """Send the event to the server that this process knows; an automation can match what is in its resource.

    Args:
        run: name of the run, or its directory.
        numbers: of `flows.numbers`; all of them are in the payload, with `run`.
        flow_run: id of the flow run that probed it, if one did.
    """
    resource = {
        "prefect.resource.id": f"entropy-probe.checkpoint.{run}/{numbers['checkpoint']}",
        "prefect.resource.name": f"{run}: {numbers['checkpoint']}",
        "entropy-probe.run": run,
        "entropy-probe.checkpoint": str(numbers["checkpoint"]),
        "entropy-probe.verdict": str(numbers["verdict"]),
        "entropy-probe.direction": str(numbers["direction"]),
    }
    role = {"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}
    emit_event(PROBED, resource=resource, related=[role] if flow_run else [], payload={"run": run, **numbers})
