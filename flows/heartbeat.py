"""A flow run whose process dies without a word is marked as crashed, by an automation of the server.

Prefect's runner marks the runs whose processes end while it watches. If it is killed together with them, nobody is left
to say so but the server, which misses their heartbeats.
"""

from datetime import timedelta

from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

NAME = "entropy-probe: a run without a heartbeat has crashed"
SILENCE = timedelta(seconds=90)
"""Three heartbeats; `service.environment` says how often a run sends one."""


def watch_heartbeats() -> None:
    """Tell the server to mark silent runs, unless it was told before."""
    ends = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "Scheduled")
    automation = AutomationCore(
        name=NAME,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ends)},
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Its process fell silent; retry goes on.")],
    )
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(NAME):
            client.create_automation(automation)
