"""An interpreter whose `vllm` is the stand-in of `stand_ins/`, or a real one."""

import os
import sys
from pathlib import Path

STAND_INS = Path(__file__).resolve().parent / "stand_ins"
REAL = os.environ.get("VLLM_PYTHON", "")
"""Interpreter of an environment with a real vLLM, for tests that want one."""


def stand_in(directory: Path) -> str:
    """A program that runs this interpreter with the stand-in beside its own packages; see `plant`."""
    program = directory / "python"
    plant(directory, "")
    variables = f'PYTHONPATH="{STAND_INS}" STAND_IN="{directory}/fault" OMP_NUM_THREADS=1'
    program.write_text(f'#!/bin/sh\n{variables} exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def plant(directory: Path, fault: str) -> None:
    """Let the stand-in go wrong from now on, in one of the ways that it knows; empty: not any more."""
    (directory / "fault").write_text(fault)
