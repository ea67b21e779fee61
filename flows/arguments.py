"""Arguments that several commands have."""

import argparse
from pathlib import Path

STORE = Path("artifacts")


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """Let the store be named."""
    parser.add_argument("--artifacts", type=Path, metavar="FOLDER", help="the store (default: artifacts)")
