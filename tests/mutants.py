"""Tests of copies of the project, each in a process forked from this one, which has loaded the libraries.

    python mutants.py '{"copy of the project": ["tests/test_a.py", …], …}'

Loading them takes longer than most of these tests. In each copy, `output` is what pytest said, and `status` its exit
status.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401
import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import transformers.models.gemma2.modeling_gemma2
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

SECONDS = 1800
"""What a copy may take: a mistake can make a test run for ever, and without one all files run."""


def main(copies: dict[str, list[str]]) -> None:
    """Test all copies, as many at a time as there are cores."""
    waiting, running = list(copies.items()), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            copy, files = waiting.pop(0)
            running[start(Path(copy), files)] = Path(copy)
        process, status = os.wait()
        (running.pop(process) / "status").write_text(str(os.waitstatus_to_exitcode(status)))


def start(copy: Path, files: list[str]) -> int:
    """Run files of tests of a copy until one fails, with the copy's own package; returns the process."""
    if process := os.fork():
        return process
    status = 3
    try:
        signal.alarm(SECONDS)
        output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(copy)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest would warn that it cannot rewrite what is loaded
        sys.path[0] = str(copy)
        if any(name.partition(".")[0] == "entropy_core" for name in sys.modules):
            raise ImportError("a package was loaded already, and it is not the copy's")
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
