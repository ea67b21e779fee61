"""Says on the page of a run that it waits for another: `entropy-probe serve` executes one at a time.

Prefect's own word for it is Late, without a reason.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.service import QUEUED

_SECONDS_BETWEEN_LOOKS = 3.0


def tell_those_that_wait(deployments: Sequence[UUID]) -> None:
    """Look for runs that wait, as long as this process lives, in a thread of its own.

    Args:
        deployments: ids of those that this process serves.
    """

    def look() -> None:
        with get_client(sync_client=True) as client:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                with suppress(Exception):  # of a server that is busy or gone; what serves the runs says so itself
                    tell(client, deployments)

    ended = threading.Event()
    threading.Thread(target=look, daemon=True, name="waiting").start()


def tell(client: SyncPrefectClient, deployments: Sequence[UUID]) -> None:
    """Say of every run that waits what it waits for, in its state and in its log; once of each.

    Args:
        client: of the server.
        deployments: ids of those that are served together.
    """
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=list(deployments)),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED])
            ),
        )
    )
    under_way = [run for run in runs if run.state and not run.state.is_scheduled()]
    if not under_way:
        return
    other = f"“{under_way[0].name}”" if under_way[0].tags else "another run"  # which has no name of its own yet
    for run in runs:
        if _waits(run):
            _tell_one(client, run, f"Waits until {other} has ended: runs are executed one at a time.")


def _waits(run: FlowRun) -> bool:
    """Whether a run is due, and was not told yet."""
    state, due = run.state, run.next_scheduled_start_time
    return bool(state and state.is_scheduled() and state.name != QUEUED and due and due <= datetime.now(UTC))


def _tell_one(client: SyncPrefectClient, run: FlowRun, why: str) -> None:
    assert run.state
    queued = State(type=StateType.SCHEDULED, name=QUEUED, message=why)
    queued.state_details.scheduled_time = run.state.state_details.scheduled_time
    client.set_flow_run_state(run.id, queued)
    log = LogCreate(name="entropy_probe.waiting", level=logging.INFO, message=why, timestamp=datetime.now(UTC))
    log.flow_run_id = run.id
    client.create_logs([log])
