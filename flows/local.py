"""A sweep on this machine, or the UI, with nothing to set up: `make sweep` and `make ui`.

    python -m flows.local sweep [--config configs/demo.yaml] [--port 0]
    python -m flows.local up [--config configs/demo.yaml] [--port 4200]

Both start a Prefect server and the process that serves the deployments, unless this folder's are up already, and stop
what they started. `sweep` then triggers the deployment, as anybody would, and prints its results.
"""

import argparse
import json
import re
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from entropy_core.errors import ProbeError
from entropy_core.read_config import load_config
from flows.door import how_to_enter, key_file
from flows.results import agreement_table, terminal_table
from flows.service import DEPLOYMENTS, FLOW, HOME, ROOT, ServiceError, child, request, service

_EVENT = re.compile(r"● +\S+ +\S{12} prefect\.(flow-run|task-run)\.(\w+) \* (.*)")
_LOG = re.compile(r"▪ +\S+ +\S{12} (.*)")
_SHOWN = {"Completed": "computed", "Cached": "reused", "Failed": "failed", "AwaitingRetry": "will be tried again"}
_NOISE = ("●", "Creating flow run", "└── Parameters", "└── Job", "└── Scheduled", " ")
_HUSHED = ("Beginning flow run", "View at", "Finished in state", "Encountered exception", "Engine execution exited")


def sweep(config_path: Path, port: int) -> int:
    """Run a checkpoint sweep through Prefect and print its results.

    Args:
        config_path: a YAML file.
        port: of the server, if one must be started; 0: any free one.

    Returns:
        The exit status: 0 if the run was completed.

    Raises:
        ProbeError: the configuration is wrong, or Prefect does not start.
    """
    config = load_config(config_path).model_dump(mode="json")
    print("Starting Prefect …", flush=True)
    with service(port) as (api_url, started_here):
        print(f"Prefect {'started' if started_here else 'is up already'}: {api_url.removesuffix('/api')}", flush=True)
        status, run_id = _trigger(config, api_url)
        _wait_for_records(run_id, api_url)
        state = request(f"{api_url}/flow_runs/{run_id}")["state"] if run_id else {}
        message = state.get("message") or "No run was made."
        if status == 0:
            _print_results(Path(message.removeprefix("Results in ")))
        else:
            reason = message.removeprefix("Flow run encountered an exception: ")
            print(f"\nThe sweep failed. {reason}\nDetails: {HOME / 'serve.log'}", file=sys.stderr)
    return status


def up(config_path: Path, port: int) -> NoReturn:
    """Keep Prefect's UI and the deployments up until interrupted.

    Args:
        config_path: a YAML file, with which the form of the sweep begins.
        port: of the server.

    Raises:
        ConfigError: the configuration is wrong.
        ServiceError: Prefect does not start, is up already, or ends by itself.
    """
    load_config(config_path)
    print("Starting Prefect …", flush=True)
    with service(port, config_path) as (api_url, started_here):
        url = api_url.removesuffix("/api")
        if not started_here:
            raise ServiceError(f"this folder's Prefect is up already, at {url}", way_out="use that one")
        key = shlex.quote(str(key_file(HOME)))
        commands = "\n".join(f"    prefect deployment run {FLOW}/{name} --watch" for name in DEPLOYMENTS)
        print(
            f"\nPrefect is up: {how_to_enter(HOME, url, private=sys.stdout.isatty())}\n"
            "Start a run there, or in another terminal:\n\n"
            f'    export PREFECT_API_URL={api_url} PREFECT_API_AUTH_STRING="$(cat {key})"\n'
            f"{commands}\n\nCtrl-C ends it.",
            flush=True,
        )
        while True:
            signal.pause()


def _trigger(config: dict[str, Any], api_url: str) -> tuple[int, str]:
    """Run the deployment with Prefect's own command; returns its exit status and the id of the flow run."""
    command = ["-m", "prefect", "deployment", "run", f"{FLOW}/{DEPLOYMENTS[0]}", "--watch", "--param"]
    print(f"$ prefect {' '.join(command[2:])} 'config={{…}}'", flush=True)
    run_id = ""
    with child([*command, f"config={json.dumps(config)}"], api_url) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                if found := re.search(r"UUID: ([0-9a-f-]{36})", line):
                    run_id = found[1]
                if shown := _for_reader(line.rstrip()):
                    print(shown, flush=True)
            return process.wait(), run_id
        except BaseException:
            if run_id:
                with suppress(ServiceError):
                    request(f"{api_url}/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
            raise


def _wait_for_records(run_id: str, api_url: str) -> None:
    """Let the server note the last states of the tasks, which it does a little after the run has ended."""
    of_run = {"flow_runs": {"id": {"any_": [run_id]}}}
    settled = {"task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}}
    deadline = time.monotonic() + 60
    while run_id and time.monotonic() < deadline:
        # one that has no state yet is not settled either
        if request(f"{api_url}/task_runs/count", of_run) == request(f"{api_url}/task_runs/count", of_run | settled):
            return
        time.sleep(0.5)


def _for_reader(line: str) -> str:
    """Shorten one line of what `--watch` prints: states of stages, log lines without their tracebacks."""
    if event := _EVENT.match(line):
        kind, state, name = event.groups()
        if state == "Late":
            return "  waits: another run is under way"
        return f"  {_SHOWN[state]:9} {name}" if kind == "task-run" and state in _SHOWN else ""
    if entry := _LOG.match(line):
        return "" if entry[1].startswith(_HUSHED) else f"  {entry[1]}"
    return "" if line.startswith(_NOISE) else line


def _print_results(run_directory: Path) -> None:
    import pyarrow.parquet

    rows, replicates = (
        pyarrow.parquet.read_table(run_directory / f"{name}.parquet").to_pylist() for name in ("results", "replicates")
    )
    print(f"\n{terminal_table(rows)}")
    if agreement := agreement_table(rows, replicates):
        print(f"\n{agreement}")
    print(f"\n{run_directory}/")
    for path in sorted(run_directory.iterdir()):
        print(f"    {path.name}")


def _interrupted(number: int, frame: Any) -> None:
    """End by way of every `finally`, and let nothing interrupt those."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    print("\nStopping …", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.local", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sweep_parser = commands.add_parser("sweep", help="run one sweep and print its results")
    demo = ROOT / "configs" / "demo.yaml"
    sweep_parser.add_argument("--config", type=Path, default=demo, help="a YAML file")
    sweep_parser.add_argument("--port", type=int, default=0, help="of the server; 0: any free one")
    up_parser = commands.add_parser("up", help="keep the UI and the deployments up until Ctrl-C")
    up_parser.add_argument("--config", type=Path, default=demo, help="a YAML file: what the form begins with")
    up_parser.add_argument("--port", type=int, default=4200, help="of the server")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        return sweep(options.config, options.port) if options.command == "sweep" else up(options.config, options.port)
    except ProbeError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
