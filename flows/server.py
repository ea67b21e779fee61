"""This folder's Prefect server: Prefect's own application, behind a door.

    python -m flows.server FD

FD is the socket to listen on, bound by the process that starts this one: so the port is known to be ours before
anything runs. The settings come from the environment, the auth string among them, which Prefect asks for on every route
of its API but /health. Added here:

- a request for another host than this machine is refused: a foreign page cannot reach the server under its own name;
- pages load and ask nothing but this server, and no page of another site may frame them;
- the older UI only: the newer one asks an outside analytics host from the browser;
- who wants to write to the database waits for who writes: a form that is sent while a sweep tells of its stages would
  otherwise be refused, and a browser does not try again;
- a run that was suspended stays so until somebody resumes it: the page asks for a limit of five minutes unless told
  otherwise, after which Prefect lets the run fail;
- `/enter#KEY`, the link that logs a browser in. What follows the # never leaves the browser.
"""

import argparse
import base64
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import prefect
import uvicorn
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse
from prefect.server.api.server import create_app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.server.orchestration.core_policy import CoreFlowPolicy
from prefect.server.orchestration.dependencies import ORCHESTRATION_DEPENDENCIES
from prefect.server.orchestration.policies import FlowRunOrchestrationPolicy
from prefect.server.orchestration.rules import FlowRunUniversalTransform, OrchestrationContext
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ["127.0.0.1", "localhost"]
"""Names of this machine, whatever the port: a tunnel may have another at its near end."""

_ENTER = """
const key = btoa(decodeURIComponent(location.hash.slice(1)));
fetch("/api/admin/version", {headers: {Authorization: `Basic ${key}`}}).then(answer => {
    if (answer.ok) localStorage.setItem("prefect-password", key);
    location.replace("/");
});
"""
_ENTER_HASH = base64.b64encode(hashlib.sha256(_ENTER.encode()).digest()).decode()

POLICY = {
    "Content-Security-Policy": "default-src 'self'; "
    f"script-src 'self' 'unsafe-eval' 'sha256-{_ENTER_HASH}'; "  # the graph of a run compiles its shaders' code
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class OneWriterAtATime(AioSqliteConfiguration):
    """The database, whose transactions take the lock when they begin.

    SQLite refuses at once, however long it may wait, a transaction that has read and now wants to write when another
    one wrote in between: `SQLITE_BUSY_SNAPSHOT`, which Prefect answers with 503.
    """

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncIterator[AsyncSessionTransaction]:
        """As Prefect's own, for one that writes."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


class SuspendedUntilResumed(FlowRunUniversalTransform):
    """Leaves out the limit after which a suspended run fails."""

    async def before_transition(self, context: OrchestrationContext[Any, Any]) -> None:
        """Change the state that is asked for, before it is judged."""
        if context.proposed_state is not None and context.proposed_state.name == "Suspended":
            context.proposed_state.state_details.pause_timeout = None


class FlowPolicy(FlowRunOrchestrationPolicy):
    """Prefect's own rules on the states of a run, and ours."""

    @staticmethod
    def priority() -> list[Any]:
        """Our own before all others."""
        return [SuspendedUntilResumed, *CoreFlowPolicy.priority()]


async def _flow_policy() -> type[FlowRunOrchestrationPolicy]:
    return FlowPolicy


def with_policy(app: ASGIApp) -> ASGIApp:
    """Say with every answer of an application what a browser may do with it."""
    policy = [(name.lower().encode(), value.encode()) for name, value in POLICY.items()]

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *policy]}
            await send(message)

        await app(scope, receive, send_with_policy)

    return answering


def application() -> ASGIApp:
    """Make Prefect's application with the door in front of it; its settings come from the environment."""
    prefect.__ui_v2_static_path__ = Path("/nowhere")  # what is not there is neither served nor offered
    ORCHESTRATION_DEPENDENCIES["flow_policy_provider"] = _flow_policy
    MODELS_DEPENDENCIES["database_config"] = OneWriterAtATime(PREFECT_API_DATABASE_CONNECTION_URL.value())
    app = create_app(final=True)
    page = f"<!doctype html><title>entropy-probe</title><script>{_ENTER}</script>"
    app.add_api_route("/enter", lambda: HTMLResponse(page))
    app.router.routes.insert(0, app.router.routes.pop())  # before the UI, which takes every path
    # Around it and not in it: the server also asks itself, under a name of its own.
    return with_policy(TrustedHostMiddleware(app, allowed_hosts=HOSTS, www_redirect=False))


def main() -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser(prog="python -m flows.server", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fd", type=int, help="the socket to listen on")
    listener = socket.socket(fileno=parser.parse_args().fd)
    uvicorn.Server(uvicorn.Config(application(), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
