"""Automations of the server that mark a flow run as crashed when its process died without reporting it.

Prefect's runner does that for processes that end while it runs. If it is killed together with them, only the server can
notice, because their heartbeats stop.

A run that was suspended falls silent, too: its process ends the stage in hand, with heartbeats, and then itself. An
automation knows events and no states, so there are two. The first pauses what is silent, which a server lets happen to
a run that is Running and to no other; the second says of a run so paused that it has crashed.
"""

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

NAME = "entropy-probe: a run without a heartbeat has crashed"
SILENT = "Silent"
"""Name of the state between the two."""
SILENCE = timedelta(seconds=90)
"""Three heartbeats; `service.environment` says how often a run sends one."""


def watch_heartbeats(deployments: Iterable[UUID]) -> None:
    """Tell the server to mark silent runs of these deployments, and no others.

    Args:
        deployments: their ids. They replace those of an earlier call.
    """
    states = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "Scheduled")
    ours = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": sorted(f"prefect.deployment.{deployment}" for deployment in deployments),
    }
    silent = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=ours,
        for_each={"prefect.resource.id"},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in (*states, SILENT))},
        threshold=1,
        within=SILENCE,
    )
    paused = EventTrigger(
        posture=Posture.Reactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=ours,
        expect={f"prefect.flow-run.{SILENT}"},
        threshold=1,
    )
    crashed = ChangeFlowRunState(state=StateType.CRASHED, message="Its process fell silent; Retry goes on.")
    with get_client(sync_client=True) as client:
        _keep(client, f"{NAME} (its second half)", paused, crashed)
        _keep(client, NAME, silent, ChangeFlowRunState(state=StateType.PAUSED, name=SILENT))


def _keep(client: SyncPrefectClient, name: str, trigger: EventTrigger, action: ChangeFlowRunState) -> None:
    """Make an automation, or change the one of this name; one that is as it should be goes on with what it has seen."""
    existing = client.read_automations_by_name(name)
    wanted = [action], trigger.match_related, trigger.within
    for automation in existing:
        told = automation.trigger
        found = automation.actions, getattr(told, "match_related", None), getattr(told, "within", None)
        if found != wanted:
            changed = AutomationCore(name=name, enabled=automation.enabled, trigger=trigger, actions=[action])
            client.update_automation(automation.id, changed)
    if not existing:
        client.create_automation(AutomationCore(name=name, trigger=trigger, actions=[action]))
