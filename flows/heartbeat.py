"""An automation of the server that marks a flow run as crashed when its process died without reporting it.

Prefect's runner does that for processes that end while it runs. If it is killed together with them, only the server can
notice, because their heartbeats stop.
"""

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

NAME = "entropy-probe: a run without a heartbeat has crashed"
SILENCE = timedelta(seconds=90)
"""Three heartbeats; `service.environment` says how often a run sends one."""


def watch_heartbeats(deployments: Iterable[UUID]) -> None:
    """Tell the server to mark silent runs of these deployments, and no others.

    Args:
        deployments: their ids. They replace those of an earlier call.
    """
    silent_states = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "Scheduled")
    names = sorted(f"prefect.deployment.{deployment}" for deployment in deployments)
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "deployment", "prefect.resource.id": names},
        for_each={"prefect.resource.id"},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in silent_states)},
        threshold=1,
        within=SILENCE,
    )
    actions = [ChangeFlowRunState(state=StateType.CRASHED, message="Its process fell silent; retry goes on.")]
    with get_client(sync_client=True) as client:
        existing = client.read_automations_by_name(NAME)
        for automation in existing:
            if getattr(automation.trigger, "match_related", None) != trigger.match_related:
                changed = AutomationCore(name=NAME, enabled=automation.enabled, trigger=trigger, actions=actions)
                client.update_automation(automation.id, changed)
        if not existing:
            client.create_automation(AutomationCore(name=NAME, trigger=trigger, actions=actions))
