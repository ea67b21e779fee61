"""Every command of the README and of its pages that needs no server. Run by `make test-sweep`.

Those that do are in test_demo_sweep.py and in test_ui.py.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from demo_fixtures import COMMAND, ROOT, copy_of_the_demo_run, documented_commands, run

pytestmark = pytest.mark.sweep

SMALL = {
    "batch_config": {"E_total_sequences": 32, "B_U": 4, "G": 4},
    "generation": {"max_new_tokens": 32},
    "update": {"reward": "arithmetic"},
    "importance": {"etas": [0, 1]},
    "execution": {"shard_size": 16, "device": "cpu"},
}
ELSEWHERE = (
    "make test",  # which runs this
    "pip install .",  # in test_packaging.py
    "entropy-probe store seal",  # which needs a key, in test_signature.py
    "make ui",  # in test_demo_sweep.py; `served` is what it does, and what the next one does
    "entropy-probe ui my-run.yaml",
    "entropy-probe serve my-run.yaml --work-pool probe",  # in test_ui.py, like the next four
    "entropy-probe watch runs/grpo --config my-run.yaml --report-to",  # in test_reporters.py, like the next one
    "prefect automation create",
    *("export PREFECT_", "prefect server start ", "prefect work-pool ", "prefect worker start "),
    *("make sweep", "prefect deployment run entropy-probe/"),  # in test_demo_sweep.py
    *("git clone ", "pip install ", "python train.py"),  # in test_first_result.py, like the next one
)
WATCHES_A_TRAINING = "entropy-probe watch runs/grpo"


def test_every_other_command_of_the_documentation_runs(tmp_path):
    """One after the other, in a folder with the files that they name; keys are those of an artifact that is there."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "artifacts").mkdir()
    demo_run = copy_of_the_demo_run(tmp_path / "artifacts" / "demo-run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "grpo").symlink_to(demo_run)
    small = SMALL | {"checkpoints": [str(demo_run / "checkpoint-6")]}
    (tmp_path / "old.yaml").write_text((ROOT / "tests" / "legacy" / "seed_era.yaml").read_text())
    for name in ("my-run", "lora", "configs/demo"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(small | {"name": Path(name).name}))
    commands = [c for c in dict.fromkeys(documented_commands()) if not c.startswith(ELSEWHERE)]
    commands.remove(WATCHES_A_TRAINING)
    assert len(commands) >= 15 and all(command.startswith("entropy-probe ") for command in commands)
    known = {"4f1c09", "b2277e"}
    for command in commands:
        command = command.replace(" -o my-run.yaml", " -o initial.yaml")  # beside the small one
        if known & set(command.split()):
            keys = sorted(path.parent.name for path in (tmp_path / "artifacts").glob("score-e-batch/*/manifest.json"))
            command = command.replace("4f1c09", keys[0][:12]).replace("b2277e", keys[1][:12])
        if "compare demo-" in command:
            ids = sorted(path.parent.name for path in (tmp_path / "artifacts" / "runs").glob("*/run.json"))
            command = command.replace("demo-3710175b0557", ids[0]).replace("demo-ae57f524470e", ids[1])
        run(["bash", "-c", command.replace("entropy-probe", shlex.quote(str(COMMAND)))], folder=tmp_path)
    run([str(COMMAND), "plan", "initial.yaml"], folder=tmp_path)  # as it is
    recorded = run([str(COMMAND), "runs"], folder=tmp_path)
    assert {"my-run", "lora", "old"} <= set(re.findall(r"(\S+)-[0-9a-f]{12} ", recorded))
