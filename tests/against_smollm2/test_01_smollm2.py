"""One step of a LoRA run of SmolLM2, against TRL, which really trains on under every intervention."""

import json
from pathlib import Path

import pytest
from proofs import Proof
from trained_on import (
    AS_IT_IS,
    OF_ONE_STEP,
    WAYS,
    Runs,
    Started,
    Subject,
    Way,
    show_one_step,
    swept,
    train_on,
)

from entropy_core.demo.smollm2 import defines, in_template

pytest.importorskip("trl")
pytestmark = pytest.mark.against_smollm2

ROOT = Path(__file__).resolve().parents[2]
RUN, CHECKPOINT = ROOT / "artifacts" / "smollm2" / "run", "checkpoint-4"
CONFIG, KEPT = ROOT / "configs" / "smollm2.yaml", ROOT / "artifacts" / "against-smollm2"
STEPS, SEEDS, MEASURED, OF_E = 6, 2, (3, 6), 64
P, G = 8, 4
OF_PREDICTION = {"B_U": 32, "G": G, "E_total_sequences": 256}
ALL = (*WAYS, Way("scale_rewards", "batch", {"scale_rewards": "batch"}))
OFTEN = (AS_IT_IS, *(way for way in ALL if way.label in ("lr: 2", "entropy_coef: 0.1")))
SETTINGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": P * G // 16,
    "num_generations": G,
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
    return Started(model, tokenizer, [row | {"prompt": in_template(tokenizer, row["prompt"])} for row in rows], defines)


SUBJECT = Subject(RUN / CHECKPOINT, start, SETTINGS, STEPS, MEASURED, SEEDS, OF_E)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("runs")
    return train_on(SUBJECT, home, (AS_IT_IS, *ALL), OFTEN, KEPT.with_suffix(".json"))


def test_one_step_against_what_runs_do(record: Proof, runs: Runs):
    record(
        "One step against a run",
        claim=f"From {CHECKPOINT} of the LoRA run of SmolLM2-135M-Instruct (`make sweep-smollm2`) TRL trains on for "
        f"{STEPS} steps, on {P} prompts with {G} responses each, as the run was and under each of {len(ALL)} "
        f"interventions, from {SEEDS} seeds. Its entropy then, on an E of {OF_E}, minus that of the run as it was from "
        "the same seed, against the difference that a single step makes: as it is predicted on "
        f"{OF_PREDICTION['B_U']} prompts and an E of {OF_PREDICTION['E_total_sequences']}. With more prompts than TRL "
        "steps on, the step is less noisy, its gradient is smaller, and `max_grad_norm` clips it less. TRL's runs and "
        "the stages of the prediction are kept for the next call, as long as nothing that they are made of changes.",
        limit="none: it says what an intervention does first, and not where it leads",
        columns=OF_ONE_STEP,
    )
    rows = swept(CONFIG, SUBJECT.checkpoint, KEPT, ALL, OF_PREDICTION)
    show_one_step(record, rows, SUBJECT, runs, ALL)
