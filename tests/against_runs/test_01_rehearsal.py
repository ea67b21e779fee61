"""One step and a rehearsal of the demo policy, against TRL, which really trains on under every intervention."""

from pathlib import Path

import pytest
import torch
from proofs import Proof
from trained_on import (
    AS_IT_IS,
    OF_A_REHEARSAL,
    OF_ONE_STEP,
    WAYS,
    Runs,
    Started,
    Subject,
    Way,
    rank_correlation,
    show_one_step,
    show_rehearsal,
    swept,
    train_on,
)

from entropy_core.demo.run import build_tokenizer
from entropy_core.prompts.arithmetic import exact_match, problems

pytest.importorskip("trl")
pytestmark = pytest.mark.against_runs

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
CHECKPOINT = "checkpoint-12"
P, G, STEPS, SEEDS, MEASURED, OF_E = 64, 8, 6, 3, (3, 6), 384
OF_PREDICTION = 1024
ALL = (*WAYS[:4], Way("weight_decay", 20.0, group={"weight_decay": 20.0}), *WAYS[4:])
REHEARSED = [
    way for way in ALL if way.label in ("lr: 0.5", "lr: 2", "beta2: 0.9", "weight_decay: 20", "entropy_coef: 0.1")
]
"""Which of them are rehearsed, beside the run as it is."""
SETTINGS = {
    "per_device_train_batch_size": P * G,
    "steps_per_generation": 1,
    "num_generations": G,
    "max_completion_length": 32,
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
}


def start(checkpoint: Path) -> Started:
    from transformers import AutoModelForCausalLM

    rows = [{name: one[name] for name in ("prompt", "answer")} for one in problems("train", 512)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Started(model, build_tokenizer(), rows, exact_match)


@pytest.fixture(scope="module")
def subject(demo_run: Path) -> Subject:
    return Subject(demo_run / CHECKPOINT, start, SETTINGS, STEPS, MEASURED, SEEDS, OF_E)


@pytest.fixture(scope="module")
def runs(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("runs")
    return train_on(subject, home, (AS_IT_IS, *ALL), often=(AS_IT_IS, *REHEARSED))


def test_one_step_against_what_runs_do(record: Proof, subject: Subject, runs: Runs, tmp_path: Path):
    record(
        "One step against a run",
        claim=f"From {CHECKPOINT} of the demo run TRL trains on for {STEPS} steps, on {P} prompts with {G} responses "
        f"each, as the run was and under each of {len(ALL)} interventions, from {SEEDS} seeds. Its entropy then, "
        "minus that of the run as it was from the same seed, against the difference that a single step makes: as it is "
        f"predicted on as many prompts and an E of {OF_PREDICTION:,}.",
        limit="TRL ranks the interventions from one seed as from another, with a rank correlation of 0.7 on average; "
        "one step has no limit: it says what an intervention does first, and not where it leads",
        columns=OF_ONE_STEP,
    )
    batch = {"B_U": P, "G": G, "E_total_sequences": OF_PREDICTION}
    rows = swept(CONFIG, subject.checkpoint, tmp_path, ALL, batch)
    assert show_one_step(record, rows, subject, runs, ALL) >= 0.7


def test_a_rehearsal_against_what_runs_do(record: Proof, subject: Subject, runs: Runs, tmp_path: Path):
    record(
        "A rehearsal against a run",
        claim=f"The same {STEPS} steps are rehearsed from {SEEDS} seeds, as the run was and under {len(REHEARSED)} of "
        "the interventions. The band is that of one more run, `H_run_low` to `H_run_high`: from three seeds it has two "
        f"degrees of freedom, and is wide. H of each of TRL's {SEEDS} runs is measured on an E of {OF_E} of its own, "
        "and the differences are from the run as it is from the same seed.",
        limit="at least 90 % of TRL's runs are within the bands of 95 %, and the rank correlation of the rehearsed "
        "differences with TRL's is at least 0.7",
        columns=OF_A_REHEARSAL,
    )
    rehearse = {"steps": STEPS, "seeds": SEEDS, "interventions": "all", "every": MEASURED[0]}
    batch = {"B_U": P, "G": G, "E_total_sequences": OF_E}
    rows = swept(CONFIG, subject.checkpoint, tmp_path, REHEARSED, batch, rehearse=rehearse)
    inside, pairs = show_rehearsal(record, rows, subject, runs, REHEARSED)
    ranks = rank_correlation(pairs)
    record.note(
        f"Rank correlation of the rehearsed differences with TRL's: {ranks:.2f}, of {len(pairs)} interventions."
    )
    assert inside >= 0.9
    assert ranks >= 0.7
