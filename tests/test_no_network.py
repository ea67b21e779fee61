"""A whole sweep asks nobody: no name is looked up, nothing is connected to, and it does without a network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pipeline_fixtures import make_run, values

ROOT = Path(__file__).parents[1]
ASKING = '{"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect", "socket.sendto"}'
SWEEP = f"""
import json, sys
asked = []
sys.addaudithook(lambda event, arguments: asked.append(f"{{event}} {{arguments!r}}") if event in {ASKING} else None)
from flows.cli import main
status = main(["sweep", sys.argv[1], "--direct"])
status = status or main(["variance", "--direct", "--confidence", "0.5", "--artifacts", sys.argv[2]])
print("\\n" + json.dumps({{"status": status, "asked": asked}}))
"""


def config_of(home: Path) -> Path:
    make_run(home / "run")
    small = {"E_total_sequences": 4, "B_U": 2, "G": 2}
    one = [str(home / "run" / "checkpoint-3")]
    of = values(home / "run", home / "artifacts", checkpoints=one, batch_config=small)
    (home / "config.yaml").write_text(yaml.safe_dump(of))
    return home / "config.yaml"


def without_network() -> list[str]:
    """What runs a command in a network of its own that has nothing in it; skips where that is not allowed."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make a network namespace")
    return ["unshare", "-n"]


@pytest.mark.chaos
@pytest.mark.attack("a whole sweep in a network namespace without a network: not a name is looked up")
def test_a_sweep_asks_nobody(tmp_path):
    command = [*without_network(), sys.executable, "-c", SWEEP]
    arguments = [str(config_of(tmp_path)), str(tmp_path / "artifacts")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"status": 0, "asked": []}
    assert (tmp_path / "artifacts" / "runs").exists()
