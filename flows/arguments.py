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
