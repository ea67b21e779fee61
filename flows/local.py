"""A sweep through Prefect on this machine, or its UI, with nothing to set up.

`entropy-probe sweep`, `variance` and `ui` are this. Each starts a Prefect server and the process that serves the
deployments, unless those of the store are up already, and stops what it started. A sweep then triggers the deployment,
as anybody would, and prints its results.
"""

import json
import re
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.read import load_config
from entropy_core.config.schema import VarianceRequest
from entropy_core.store import runs
from flows import service
from flows.door import how_to_enter, key_file
from flows.results import RESULT, print_results
from flows.service import DEPLOYMENTS, FLOW, QUEUED, ServiceError, child, request
from flows.stage_lines import not_told, recorded_lines, stage_line

_EVENT = re.compile(r"● +\S+ +\S{12} prefect\.(flow-run|task-run)\.(\w+) \* (.*)")
_LOG = re.compile(r"▪ +\S+ +\S{12} (.*)")
_SHOWN = {"Completed": "computed", "Cached": "reused", "Failed": "failed", "AwaitingRetry": "will be tried again"}
_OF = " · "  # in the name of every run of a stage; that of a checkpoint, around its stages, has none
_TOLD_AT_ONCE = ("Failed", "AwaitingRetry")
_SETTLED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_NOTED_WITHIN = 60.0  # seconds
_BETWEEN_LOOKS = 2.0  # seconds
_NOISE = ("●", "Creating flow run", "└── Parameters", "└── Job", "└── Scheduled", " ")
_HUSHED = (
    "Beginning flow run",
    "View at",
    "Finished in state",
    "Encountered exception",
    "Engine execution exited",
    RESULT,
)


def sweep(config_path: Path) -> int:
    """Run a checkpoint sweep through Prefect and print its results.

    Args:
        config_path: a YAML file.

    Returns:
        The exit status: 0 if the run was completed.

    Raises:
        ProbeError: the configuration is wrong, or Prefect does not start.
    """
    config = load_config(config_path, must_exist=True)
    if config.execution.device == "cuda":
        from entropy_core.pipeline.preflight import check_device  # which loads torch: not for nothing

        check_device("cuda")
    service.use(config.store_root)
    return _run("checkpoint-sweep", {"config": config.as_given()}, config_path)


def variance(asked: VarianceRequest) -> int:
    """Compute the statistics of a recorded sweep again through Prefect, and print the results.

    Args:
        asked: which sweep, which settings.

    Returns:
        The exit status: 0 if the run was completed.

    Raises:
        ProbeError: there is no such sweep, or Prefect does not start.
    """
    store_root = Path(asked.artifacts)
    runs.find(store_root, asked.run)
    service.use(store_root)
    return _run("variance", {"request": asked.model_dump(mode="json", exclude_unset=True)}, None)


def interventions(asked: InterventionsRequest) -> int:
    """Try interventions on a recorded sweep through Prefect, and print the results.

    Args:
        asked: which sweep, which interventions.

    Returns:
        The exit status: 0 if the run was completed.

    Raises:
        ProbeError: there is no such sweep, or Prefect does not start.
    """
    store_root = Path(asked.artifacts)
    runs.find(store_root, asked.run)
    service.use(store_root)
    return _run("interventions", {"request": asked.model_dump(mode="json", exclude_unset=True)}, None)


def up(config_path: Path | None, port: int) -> NoReturn:
    """Keep Prefect's UI and the deployments up until interrupted.

    Args:
        config_path: a YAML file, with which the form of the sweep begins, and whose store is used; None: the form is
            empty, and the store is `artifacts` in this folder.
        port: of the server.

    Raises:
        ConfigError: the configuration is wrong.
        ServiceError: Prefect does not start, is up already, or ends by itself.
    """
    service.use(load_config(config_path).store_root if config_path else Path("artifacts"))
    print("Starting Prefect …", flush=True)
    with service.service(port, config_path) as (api_url, started_here):
        url = api_url.removesuffix("/api")
        if not started_here:
            raise ServiceError(f"the Prefect of this store is up already, at {url}", fix="use that one")
        key = shlex.quote(str(key_file(service.HOME)))
        commands = "\n".join(f"    prefect deployment run {FLOW}/{name} --watch" for name in DEPLOYMENTS)
        print(
            f"\nPrefect is up: {how_to_enter(service.HOME, url, private=sys.stdout.isatty())}\n"
            "Start a run there, or in another terminal:\n\n"
            f'    export PREFECT_API_URL={api_url} PREFECT_API_AUTH_STRING="$(cat {key})"\n'
            f"{commands}\n\nRelative paths in a form or in a parameter start at {Path.cwd()}. Ctrl-C ends it.",
            flush=True,
        )
        while True:
            signal.pause()


def _run(deployment: str, parameters: dict[str, Any], config_path: Path | None) -> int:
    """Run a deployment on the store's Prefect and print what it leaves; returns the exit status."""
    print("Starting Prefect …", flush=True)
    with service.service(config=config_path) as (api_url, started_here):
        print(f"Prefect {'started' if started_here else 'is up already'}: {api_url.removesuffix('/api')}", flush=True)
        shown: set[str] = set()
        status, run_id = _trigger(deployment, parameters, api_url, shown)
        recorded = recorded_lines(_stages(run_id, api_url, at_least=1 if status == 0 else 0))
        for line in not_told(recorded, shown):  # the stream that `--watch` follows loses lines where many come at once
            print(f"  {line}", flush=True)
        state = request(f"{api_url}/flow_runs/{run_id}")["state"] if run_id else {}
        message = state.get("message") or "No run was made."
        if status == 0:
            print_results(Path(message.removeprefix("Results in ")))
            up = f", while `entropy-probe ui{f' {config_path}' if config_path else ''}` is up" if started_here else ""
            page = f"{service.lasting_address(api_url, started_here)}/runs/flow-run/{run_id}"
            print(f"\nThe run in the browser: {page}{up}")
            return 0
        reason = message.removeprefix("Flow run encountered an exception: ")
        print(f"\nThe run failed. {reason}\nDetails: {service.HOME / 'serve.log'}", file=sys.stderr)
        return 2


def _trigger(deployment: str, parameters: dict[str, Any], api_url: str, shown: set[str]) -> tuple[int, str]:
    """Run the deployment with Prefect's own command; returns its exit status and the id of the flow run.

    The lines that it prints are added to `shown`.
    """
    command = ["-m", "prefect", "deployment", "run", f"{FLOW}/{deployment}", "--watch"]
    [(name, value)] = parameters.items()
    print(f"$ {' '.join(command[1:])} --param '{name}={{…}}'", flush=True)
    run_id = ""
    with child([*command, "--param", f"{name}={json.dumps(value)}"], api_url) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                if found := re.search(r"UUID: ([0-9a-f-]{36})", line):
                    run_id = found[1]
                if for_reader := _for_reader(line.rstrip()):
                    print(for_reader, flush=True)
                    shown.add(for_reader)
            return process.wait(), run_id
        except BaseException:
            if run_id:
                with suppress(ServiceError):
                    request(f"{api_url}/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
            raise


def _stages(run_id: str, api_url: str, at_least: int) -> list[tuple[str, str]]:
    """How each stage of a run ended, and its name, once the server has noted it, a little after the run's end."""
    noted: list[dict[str, Any]] = []
    known = -1
    deadline = time.monotonic() + _NOTED_WITHIN
    while run_id and time.monotonic() < deadline:
        noted = _task_runs(run_id, api_url)
        # one that has no state yet is not settled either; and of some the server may not know at all yet
        if at_least <= len(noted) == known and all(task["state_type"] in _SETTLED for task in noted):
            break
        known = len(noted)
        time.sleep(_BETWEEN_LOOKS)
    runs = [(task["state_name"], task["name"]) for task in noted]
    return [(_SHOWN[state], name) for state, name in runs if state in _SHOWN and _OF in name]


def _task_runs(run_id: str, api_url: str) -> list[dict[str, Any]]:
    """All task runs of a flow run, in the order in which they began, as far as the server knows them."""
    found: list[dict[str, Any]] = []
    while True:
        page = {"flow_runs": {"id": {"any_": [run_id]}}, "sort": "EXPECTED_START_TIME_ASC", "offset": len(found)}
        answer = request(f"{api_url}/task_runs/filter", page)
        found += answer
        if not answer:
            return found


def _for_reader(line: str) -> str:
    """Shorten one line of what `--watch` prints: log lines without their tracebacks, and stages that failed.

    That a stage was computed or reused the log says, in one line for all its shards.
    """
    if event := _EVENT.match(line):
        kind, state, name = event.groups()
        if state == QUEUED:
            return "  waits: another run is under way"
        told = kind == "task-run" and state in _TOLD_AT_ONCE and _OF in name
        return f"  {stage_line(_SHOWN[state], name, '')}" if told else ""
    if entry := _LOG.match(line):
        return "" if entry[1].startswith(_HUSHED) else f"  {entry[1]}"
    return "" if line.startswith(_NOISE) else line
