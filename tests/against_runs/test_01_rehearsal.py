"""One step and a rehearsal of the demo policy, against TRL, which really trains on under every intervention."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pipeline_fixtures import probe, skip_figures
from proofs import Proof
from trained_on import AS_IT_IS, WAYS, Runs, Started, Subject, Way, between_seeds, rank_correlation, said, train_on

from entropy_core.config.read import load_config
from entropy_core.demo.run import build_tokenizer
from entropy_core.prompts.arithmetic import exact_match, problems

pytest.importorskip("trl")
pytestmark = pytest.mark.against_runs

ROOT = Path(__file__).resolve().parents[2]
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


def swept(demo_run: Path, home: Path, ways: Sequence[Way], of_e: int, **lab: Any) -> list[dict[str, Any]]:
    """Rows of a sweep of the checkpoint: of rehearsal.parquet if it rehearses, else of interventions.parquet."""
    config = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    config |= {"checkpoints": [str(demo_run / CHECKPOINT)], "interventions": [way.entry for way in ways]}
    config |= {"price": False, "lab": {"measure": "none"} | lab}
    config["batch_config"] |= {"B_U": P, "G": G, "E_total_sequences": of_e}
    config["importance"] |= {"etas": [0, 1]}
    config["execution"] |= {"artifacts": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        report = probe(config).result.report
    rows = report.table("rehearsal.parquet" if "rehearse" in lab else "interventions.parquet").to_pylist()
    return [row for row in rows if row["normalization"] == "per_token"]


def test_one_step_against_what_runs_do(record: Proof, demo_run: Path, subject: Subject, runs: Runs, tmp_path: Path):
    record(
        "One step against a run",
        claim=f"From {CHECKPOINT} of the demo run TRL trains on for {STEPS} steps, on {P} prompts with {G} responses "
        f"each, as the run was and under each of {len(ALL)} interventions, from {SEEDS} seeds. Its entropy then, "
        "minus that of the run as it was from the same seed, against the difference that a single step makes: as it is "
        f"predicted on as many prompts and an E of {OF_PREDICTION:,}.",
        limit="TRL ranks the interventions from one seed as from another, with a rank correlation of 0.7 on average; "
        "one step has no limit: it says what an intervention does first, and not where it leads",
        columns=("intervention", "one step", "kept on", f"{STEPS} steps of TRL", "lowest", "highest seed"),
    )
    rows = swept(demo_run, tmp_path, ALL, OF_PREDICTION)
    predicted = {row["intervention"]: row for row in rows if row["level"] == "predict"}
    first, kept_on = [], []
    for way in ALL:
        row, found = predicted[way.label], subject.changes(runs, way)
        first.append((row["difference"], fmean(found)))
        kept = row["kept_on_difference"]
        kept_on += [] if kept is None else [(kept, fmean(found))]
        shown = [f"{one:+.5f}" for one in (fmean(found), min(found), max(found))]
        record.row(way.label, f"{row['difference']:+.5f}", "" if kept is None else f"{kept:+.5f}", *shown)
    record.note(said("one step", first))
    record.note(said("the step that is kept on, where the screen tells it,", kept_on))
    between = between_seeds(subject, runs, ALL)
    record.note(f"Of one seed of TRL with another: {between:.2f} on average.")
    assert between >= 0.7


def test_a_rehearsal_against_what_runs_do(record: Proof, demo_run: Path, subject: Subject, runs: Runs, tmp_path: Path):
    ways = REHEARSED
    record(
        "A rehearsal against a run",
        claim=f"The same {STEPS} steps are rehearsed from {SEEDS} seeds, as the run was and under {len(ways)} of the "
        "interventions. The band is that of one more run, `H_run_low` to `H_run_high`: from three seeds it has two "
        f"degrees of freedom, and is wide. H of each of TRL's {SEEDS} runs is measured on an E of {OF_E} of its own, "
        "and the differences are from the run as it is from the same seed.",
        limit="at least 90 % of TRL's runs are within the bands of 95 %, and the rank correlation of the rehearsed "
        "differences with TRL's is at least 0.7",
        columns=("intervention", "steps", "band", "H of TRL's runs", "within", "rehearsed difference", "TRL's"),
    )
    rehearse = {"steps": STEPS, "seeds": SEEDS, "interventions": "all", "every": MEASURED[0]}
    rows = swept(demo_run, tmp_path, ways, OF_E, rehearse=rehearse)
    together = {(row["intervention"], row["rehearsal_step"]): row for row in rows if row["replicate"] is None}
    inside, pairs = 0, []
    for way in (AS_IT_IS, *ways):
        for number in MEASURED:
            row, found = together[way.label, number], [of_seed[number] for of_seed in runs[way.label]]
            low, high = row["H_run_low"], row["H_run_high"]
            within = sum(low <= H <= high for H in found)
            inside += within
            differences = ["", ""]
            if way is not AS_IT_IS and number == STEPS:
                pairs.append((row["difference"], fmean(subject.changes(runs, way))))
                differences = [f"{one:+.5f}" for one in pairs[-1]]
            shown = ", ".join(f"{H:.4f}" for H in found)
            record.row(way.label, number, f"{low:.4f} to {high:.4f}", shown, f"{within} of {SEEDS}", *differences)
    count = len(MEASURED) * (1 + len(ways)) * SEEDS
    record.note(f"Within: {inside} of {count}.")
    ranks = rank_correlation(pairs)
    record.note(
        f"Rank correlation of the rehearsed differences with TRL's: {ranks:.2f}, of {len(pairs)} interventions."
    )
    assert inside >= 0.9 * count
    assert ranks >= 0.7
