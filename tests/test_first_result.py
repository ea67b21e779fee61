"""The two ways of docs/first-result.md, from a training of TRL to the answer, by the commands of the page alone.

What each command takes is printed: `pytest -m sweep -s tests/test_first_result.py`. Run by `make test-sweep`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from demo_fixtures import COMMAND, ROOT, run_directory

from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer
from entropy_core.prompts.arithmetic import problems
from entropy_core.store import runs

pytestmark = pytest.mark.sweep
pytest.importorskip("trl")

PAGE = (ROOT / "docs" / "first-result.md").read_text(encoding="utf-8")
SHAPE = DemoSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24)
INSTALLED_ALREADY = ("git clone ", "pip install ")  # of which test_packaging.py has an own environment


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


TRAINED_ALREADY, ABOUT_TO_BE_TRAINED = ([line for line in block.split("\n") if line] for block in blocks("sh"))


def test_no_way_takes_more_than_five_commands():
    for way in (TRAINED_ALREADY, ABOUT_TO_BE_TRAINED):
        assert len(way) <= 5 and [line for line in way if line.startswith(INSTALLED_ALREADY)] == way[:2]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What a person has: a model, prompts, a reward and a script, the last two as on the page."""
    build_model(SHAPE).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    prompts = [json.dumps({"prompt": problem["prompt"]}) for problem in problems("train", 64)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    script, reward = blocks("python")
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "rewards.py").write_text(reward)
    return tmp_path


def follow(way: list[str], home: Path) -> list[str]:
    """What the commands after the installation print; each must succeed, and says how long it took."""
    environment = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    printed = []
    for line in way[2:]:
        command, *arguments = shlex.split(line)
        program = {"entropy-probe": str(COMMAND), "python": sys.executable}[command]
        started = time.monotonic()
        done = subprocess.run(
            [program, *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{line}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        print(f"{time.monotonic() - started:6.0f} s  {line}")
        printed.append(done.stdout)
    return printed


def test_a_run_that_is_trained_already(home):
    script = (home / "train.py").read_text()
    (home / "train.py").write_text("".join(line for line in script.splitlines(True) if "ProbeCallback" not in line))
    follow(["", "", "python train.py"], home)  # before the first of the page's commands
    [said] = blocks("yaml")
    (home / "runs" / "grpo" / "entropy-probe.yaml").write_text(said)
    _, swept, reported = follow(TRAINED_ALREADY, home)
    config = yaml.safe_load((home / "my-run.yaml").read_text())
    assert config["batch_config"]["E_total_sequences"] == 512 and "FILL_IN" not in str(config)
    [page] = re.findall(r"^The report, in one file to read and to share: (.+)$", reported, re.MULTILINE)
    assert Path(page) == run_directory(swept) / "report.html" and Path(page).is_file()
    assert "left out" not in swept and "checkpoint-2" in reported and "checkpoint-4" in reported
    assert re.search(r"^(The|Whether the) entropy ", reported, re.MULTILINE)


def test_a_run_that_is_about_to_be_trained(home):
    _, watched = follow(ABOUT_TO_BE_TRAINED, home)
    assert "checkpoint-2" in watched and "checkpoint-4" in watched
    [run_id] = runs.recorded(home / "artifacts")
    assert (home / "artifacts" / "runs" / run_id / "report.html").is_file()
    history = json.loads((home / "runs" / "grpo" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert history and history[-1]["step"] == 4
