"""The demo run and the commands of the documentation, for the tests that `make test-sweep` runs side by side."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
DEMO_RUN = ROOT / "artifacts" / "demo-run"
COMMAND = Path(sys.executable).with_name("entropy-probe")


def demo_run_in_use() -> FileLock:
    """What whoever makes, copies or moves the demo run holds."""
    return FileLock(DEMO_RUN.with_name(f".{DEMO_RUN.name}.lock"))


def copy_of_the_demo_run(target: Path) -> Path:
    """The checkpoints of the demo run, trained where they are missing."""
    subprocess.run([sys.executable, "-m", "entropy_core.demo", "--out", DEMO_RUN], cwd=ROOT, check=True)
    with demo_run_in_use():
        shutil.copytree(DEMO_RUN, target, copy_function=shutil.copy2)
    return target


def run(command: list[str], folder: Path = ROOT, **environment: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def run_directory(output: str) -> Path:
    """Of the run that a command says it has made or found last."""
    return Path(re.findall(r"^(/.*/runs/\S+)/$", output, re.MULTILINE)[-1])


def documented_commands() -> list[str]:
    """Of README.md and of the pages in docs/, in their order."""
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    lines = [
        line.removeprefix("$ ")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.split("\n")
    ]
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]
