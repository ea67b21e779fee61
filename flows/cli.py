"""The console command, `entropy-probe`.

Every error that a user can act on ends it with exit status 2 and a message; a traceback is a bug of ours. A module is
imported when its command is called: `--help` takes no time, and what runs without Prefect does not load it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_core.code.collector import no_collection
from entropy_core.errors import ProbeError, one_line
from flows import power, run_commands, store_options, watch_options
from flows.arguments import STORE, add_artifacts, add_command
from flows.terminal import plain_output

if TYPE_CHECKING:
    from entropy_core.config.schema import VarianceRequest

_EPILOG = """\
examples:
  entropy-probe init runs/grpo -o my-run.yaml   begin with what the run's own files say
  entropy-probe plan my-run.yaml                what would run, why, and how long it would take
  entropy-probe sweep my-run.yaml               run it, with Prefect's UI while it runs
  entropy-probe sweep my-run.yaml --direct      run it in this process, on a cluster node for example
  entropy-probe watch runs/grpo                 probe each checkpoint while the run is trained
  entropy-probe interventions                   what would change the entropy of the last sweep, and how surely
  entropy-probe power --tell 0.0005              how large E and U have to be to tell such a change
  entropy-probe variance --confidence .99       the statistics of the last sweep at another confidence level

Paths in a configuration start at the folder of its file. `COMMAND --help` says more."""


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: those after the name of the command; None: of this process.

    Returns:
        The exit status: 0; 1 where `store verify` found something unsound; 2 where an error was printed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 0
    try:
        with _ending_in_order(), plain_output():
            return options.run(options)
    except ProbeError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `entropy-probe store ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        cause = "a file or a folder that you may not read or write, a full disk, or a file server that is away"
        print(ProbeError(one_line(error), cause=cause, fix="see to it, and run the same again"), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entropy-probe",
        description="Predict what the next optimizer step does to the entropy of a policy, and measure it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"entropy-probe {version('entropy-probe')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, help: str, run: Callable[[Any], int]) -> argparse.ArgumentParser:
        return add_command(commands, name, help, run)

    sweep = command("sweep", "probe the checkpoints that a configuration names, and print the results", _sweep)
    _add_config(sweep)
    _add_direct(sweep)
    _add_config(command("plan", "say what a sweep would compute, why, and what it should take; compute nothing", _plan))

    init = command("init", "write a configuration from what a run's checkpoints say, each line with its source", _init)
    init.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="the directory that holds checkpoint-*")
    init.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new file (default: standard output)")

    watch = command("watch", "probe each checkpoint of a run while it is trained, and keep those it deletes", _watch)
    watch_options.add_to(watch)
    add_artifacts(watch)

    variance = command("variance", "compute the statistics of a recorded sweep again, with other settings", _variance)
    variance.add_argument("run_id", nargs="?", default="latest", metavar="RUN", help="its id (default: latest)")
    variance.add_argument("--confidence", dest="confidence_level", type=float, metavar="X", help="level of intervals")
    variance.add_argument("--baseline", metavar="NAME", help="none, time_loo, time_loo_weighted or ridge")
    variance.add_argument("--cluster", metavar="UNIT", help="auto or prompt: what is independent in E")
    variance.add_argument("--normalizations", nargs="+", metavar="NAME", help="per_token, per_sequence or both")
    _add_direct(variance)
    add_artifacts(variance)

    tried = command("interventions", "try what might change the entropy on a recorded sweep", _interventions)
    tried.add_argument("run_id", nargs="?", default="latest", metavar="RUN", help="its id (default: latest)")
    tried.add_argument(
        "--try",
        dest="interventions",
        nargs="+",
        metavar="NAME[=VALUE]",
        help="published (the default), entropy_coef=0.01, positives_only, my_idea.py:weights, …",
    )
    tried.add_argument("--predict", metavar="WHICH", help="all (the default) or none: the exact step under each")
    tried.add_argument("--measure", metavar="WHICH", help='all, none, or "best N" (default: "best 5"): ΔH on E')
    tried.add_argument("--margin", type=float, metavar="X", help="share of |δH₁| that does not matter (default: 0.1)")
    rehearse = tried.add_argument_group("rehearsal", "real steps from the last checkpoint, each on fresh responses")
    rehearse.add_argument("--rehearse", type=int, metavar="K", help="take K steps, as the run is and under the best 3")
    rehearse.add_argument("--seeds", type=int, metavar="S", help="from so many seeds (default: 3)")
    rehearse.add_argument("--floor", type=float, metavar="H", help="say when the entropy falls below H, nats per token")
    _add_direct(tried)
    add_artifacts(tried)

    run_commands.add_to(command)
    power.add_to(command)

    store_options.add_to(commands)

    legacy = command(
        "legacy", "convert a configuration of the code before this one; the new one goes to stdout", _legacy
    )
    legacy.add_argument("old", type=Path, metavar="OLD", help="the old YAML file")

    ui = command("ui", "keep Prefect's UI and the deployments up until Ctrl-C", _ui)
    _add_config(ui, nargs="?", help="a YAML file: what the form begins with, and whose store is used")
    ui.add_argument("--port", type=int, default=4200, metavar="N", help="port of the UI (default: 4200)")
    serve = command("serve", "serve the deployments to the Prefect server at PREFECT_API_URL", _serve)
    _add_config(serve, nargs="?", help="a YAML file: what the form begins with")
    serve.add_argument("--work-pool", default="", metavar="NAME", help="register them for a pool of workers, and end")
    return parser


def _add_config(parser: argparse.ArgumentParser, **how: Any) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", **{"help": "a YAML file; docs/configuration.md has its keys"} | how
    )


def _add_direct(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--direct", action="store_true", help="in this process, without a Prefect server")


def _sweep(options: argparse.Namespace) -> int:
    if options.direct:
        with no_collection(of_lasting=True):
            from flows import direct

        return direct.sweep(options.config)
    with no_collection(of_lasting=True):
        from flows import local

    return local.sweep(options.config)


def _watch(options: argparse.Namespace) -> int:
    from flows.watch import watch

    return watch(watch_options.asked(options))


def _variance(options: argparse.Namespace) -> int:
    asked = _request(options)
    if options.direct:
        with no_collection(of_lasting=True):
            from flows import direct

        return direct.variance(asked)
    with no_collection(of_lasting=True):
        from flows import local

    return local.variance(asked)


def _interventions(options: argparse.Namespace) -> int:
    from entropy_core.config.paths import Origin
    from entropy_core.config.read import parse_interventions

    lab = {name: getattr(options, name) for name in ("predict", "measure", "margin")}
    rehearse = {"steps": options.rehearse, "seeds": options.seeds, "floor": options.floor}
    lab["rehearse"] = {name: value for name, value in rehearse.items() if value is not None} or None
    given = {"lab": {name: value for name, value in lab.items() if value is not None}}
    if options.interventions:
        given["interventions"] = options.interventions
    asked = {"run": options.run_id, "artifacts": str(options.artifacts or STORE), **given}
    request = parse_interventions(asked, Origin(Path.cwd(), must_exist=True))
    if options.direct:
        with no_collection(of_lasting=True):
            from flows import direct

        return direct.interventions(request)
    with no_collection(of_lasting=True):
        from flows import local

    return local.interventions(request)


def _request(options: argparse.Namespace) -> "VarianceRequest":
    from entropy_core.config.paths import Origin
    from entropy_core.config.read import parse_request
    from entropy_core.config.schema import VarianceConfig

    given = {name: getattr(options, name) for name in VarianceConfig.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    asked = {"run": options.run_id, "artifacts": str(options.artifacts or STORE), **given}
    return parse_request(asked, Origin(Path.cwd()))


def _plan(options: argparse.Namespace) -> int:
    from flows.plan import print_plan

    return print_plan(options.config)


def _init(options: argparse.Namespace) -> int:
    from entropy_core.pipeline.init import configuration_of

    if options.output is None:
        print(configuration_of(options.run_directory, Path.cwd()), end="")
        return 0
    text = configuration_of(options.run_directory, options.output.parent)
    try:
        with options.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ProbeError(f"{options.output} is there already", fix="give another name, or remove it") from None
    return 0


def _legacy(options: argparse.Namespace) -> int:
    from entropy_core.config.legacy import convert_file

    return convert_file(options.old)


def _ui(options: argparse.Namespace) -> int:
    from flows import local

    local.up(options.config, options.port)


def _serve(options: argparse.Namespace) -> int:
    from flows import serve

    config = ["--config", str(options.config)] if options.config else []
    serve.main([*config, "--work-pool", options.work_pool])
    return 0


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let Ctrl-C and a polite kill end this process by way of every `finally`, and let nothing interrupt those.

    A lost terminal ends it, too, unless it was started by `nohup`.
    """

    def interrupted(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        print("\nStopping …", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    before = {each: signal.signal(each, interrupted) for each in ending}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    sys.exit(main())
