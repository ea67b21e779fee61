"""The commands on a store: their options, and what runs them."""

import argparse
from pathlib import Path
from typing import Any

from flows.arguments import STORE, add_artifacts, add_command


def add_to(commands: Any) -> None:
    """Add `store` and the commands within it.

    Args:
        commands: from `add_subparsers`.
    """
    store = commands.add_parser(
        "store", help="look after what was computed: ls, verify, seal, explain, adopt, prune, export, import"
    )
    of_store = store.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def store_command(name: str, help: str) -> argparse.ArgumentParser:
        made = add_command(of_store, name, help, _run)
        made.set_defaults(store_command=name)
        add_artifacts(made)
        return made

    store_command("ls", "list what there is: size, time, and which runs need it")
    store_command("verify", "check every file; exit with 1 and name what is unsound")
    store_command("seal", "sign what is there with the key in ENTROPY_PROBE_SEAL_KEY, for a store that is shared")
    explain = store_command("explain", "say why two keys differ, or why a stage would run again")
    explain.add_argument("what", nargs="+", metavar="KEY | CONFIG", help="one key, two keys, or a configuration")
    adopt = store_command("adopt", "take over what an edit changed nothing of: one of each stage is recomputed")
    adopt.add_argument("what", metavar="CONFIG | RUN", help="a configuration, or the id of a run")
    prune = store_command("prune", "list what no recorded run needs; delete nothing without --yes")
    prune.add_argument("--keep-runs", type=_count, metavar="N", help="keep the latest N runs only (default: all)")
    prune.add_argument("--yes", action="store_true", help="delete it")
    export = store_command("export", "write one run into an archive, for another machine")
    export.add_argument("run_id", metavar="RUN", help="its id, or latest")
    export.add_argument("file", type=Path, metavar="FILE", help="the archive to write")
    export.add_argument("--all", action="store_true", help="with all that it was made from")
    export.add_argument("--with-vectors", action="store_true", help="with files of the size of the policy")
    load = store_command("import", "bring an archive into the store, verified")
    load.add_argument("file", type=Path, metavar="FILE", help="the archive")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from entropy_core.store.store import Store
    from flows import store_commands as commands

    store = Store(options.artifacts or STORE)
    match options.store_command:
        case "ls":
            return commands.ls(store)
        case "verify":
            return commands.verify(store)
        case "seal":
            return commands.seal(store)
        case "explain":
            return commands.explain(store, options.what, of_config=options.artifacts is None)
        case "adopt":
            return commands.adopt(store, options.what)
        case "prune":
            return commands.prune(store, options.keep_runs, options.yes)
        case "export":
            return commands.export(store, options.run_id, options.file, options.all, options.with_vectors)
        case _:
            return commands.load(store, options.file)
