"""One step and a rehearsal of a LoRA run of SmolLM2, against TRL, which really trains on under every intervention."""

import json
from pathlib import Path

import pytest
from trained_on import AS_IT_IS, WAYS, Runs, Started, Subject, Way, train_on

from entropy_core.demo.smollm2 import _in_template, defines

pytest.importorskip("trl")
pytestmark = pytest.mark.against_smollm2

ROOT = Path(__file__).resolve().parents[2]
RUN, CHECKPOINT = ROOT / "artifacts" / "smollm2" / "run", "checkpoint-4"
STEPS, SEEDS, MEASURED, OF_E = 6, 3, (3, 6), 64
ALL = (*WAYS, Way("scale_rewards", "batch", {"scale_rewards": "batch"}))
REHEARSED = [way for way in ALL if way.label in ("lr: 2", "entropy_coef: 0.1")]
SETTINGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 20,
    "learning_rate": 1e-4,
}


def start(checkpoint: Path) -> Started:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = checkpoint.parent
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "model")
    base = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype="float32")
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    rows = [json.loads(line) for line in (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    return Started(
        model, tokenizer, [row | {"prompt": _in_template(tokenizer, row["prompt"])} for row in rows], defines
    )


SUBJECT = Subject(RUN / CHECKPOINT, start, SETTINGS, STEPS, MEASURED, SEEDS, OF_E)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kept = ROOT / "artifacts" / "against-smollm2.json"
    return train_on(SUBJECT, tmp_path_factory.mktemp("runs"), (AS_IT_IS, *ALL), (AS_IT_IS, *REHEARSED), kept)
