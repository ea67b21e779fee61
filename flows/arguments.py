"""Arguments that several commands have."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

AddCommand = Callable[[str, str, Callable[[Any], int]], argparse.ArgumentParser]
"""Adds a command, from its name, its help and what runs it."""

STORE = Path("artifacts")


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """Let the store be named."""
    parser.add_argument("--artifacts", type=Path, metavar="FOLDER", help="the store (default: artifacts)")


def add_command(commands: Any, name: str, help: str, run: Callable[[Any], int]) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: from `add_subparsers`.
        name: what it is called.
        help: what it does, in a few words.
        run: called with the parsed options; returns the exit status.
    """
    made: argparse.ArgumentParser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    made.set_defaults(run=run)
    return made
