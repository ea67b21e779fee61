"""`entropy-probe power`: how large E and U have to be, from a recorded sweep."""

import argparse
from pathlib import Path
from typing import Any

from entropy_core.errors import ConfigError
from flows.arguments import STORE, AddCommand, add_artifacts


def add_to(command: AddCommand) -> None:
    """Add the command.

    Args:
        command: adds one, from its name, its help and what runs it.
    """
    made = command("power", "say what a recorded sweep can tell, and how large E and U have to be for more", _power)
    made.add_argument("run_id", nargs="?", default="latest", metavar="RUN", help="its id (default: the last sweep)")
    wanted = made.add_mutually_exclusive_group()
    wanted.add_argument("--tell", type=float, metavar="NATS", help="the change that is to be told from none")
    wanted.add_argument("--seconds", type=float, metavar="S", help="what a checkpoint may cost: find the best split")
    made.add_argument("--intervention", metavar="NAME", help="plan for its difference from the run as it is")
    add_artifacts(made)


def _power(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("tell", "seconds")}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} is {value:g}", fix="give a number above 0")
    root = options.artifacts or STORE
    return print_power(root, options.run_id, options.tell, options.seconds, options.intervention)


def print_power(root: Path, run_id: str, effect: float | None, budget: float | None, intervention: str | None) -> int:
    """Print what a recorded sweep tells, and what it would take to tell more.

    Args:
        root: of the store.
        run_id: of the recorded sweep; `latest` is the last one.
        effect: the change to be told, nats.
        budget: seconds for a checkpoint, of which the best split is wanted.
        intervention: plan for its difference from the run as it is.

    Returns:
        The exit status, 0.

    Raises:
        ProbeError: see `pipeline.power.planned`.
    """
    from entropy_core.pipeline.power import planned
    from entropy_core.store.store import Store
    from flows.results import aligned, duration

    rows = planned(Store(root), run_id, effect, budget, intervention)
    columns = list(rows[0])

    def text(name: str, value: Any) -> str:
        if value is None:
            return "–"
        if "seconds" in name:
            return duration(value)
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    print("\n".join(aligned([columns, *([text(name, row[name]) for name in columns] for row in rows)])))
    what = f"the difference that {intervention} makes" if intervention else "a change of the entropy"
    print(f"\n`detects`: the size of {what}, in nats, that is detected with probability 80 %.")
    if effect is not None or budget is not None:
        print("The sizes are the cheapest that do it, by the seconds that the stages of this sweep took.")
    return 0
