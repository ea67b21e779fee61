"""On the demo run: a right sweep looks like it; one with a wrong temperature, reward, prompts or template does not."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from planted_entropies import agreement
from proofs import Proof
from transformers import AutoTokenizer

from entropy_core.prompts.arithmetic import problems
from entropy_core.report.agreement import disagreements

pytestmark = pytest.mark.validate

SEEDS = 40
MOST = 0.05  # of the seeds
REWARD = "def length(completions, **_):\n    return [len(text) / 32 for text in completions]\n"
SWAPPED = "{{ messages[0]['content'].split('+')[1].rstrip('=') + '+' + messages[0]['content'].split('+')[0] + ',' }}"
"""A template that ends a prompt with another character."""


def rows(run: Path, store: Path, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of agreement.parquet for the first and the last checkpoint of a run."""
    asked: dict[str, Any] = {
        "name": "demo",
        "checkpoints": [str(run / "checkpoint-6"), str(run / "checkpoint-30")],
        "batch_config": {"E_total_sequences": 512, "B_U": 64, "G": 8},
        "generation": {"gen_batch_size": 512, "tf_batch_size": 128},
        "update": {"reward": "arithmetic"},
        "execution": {"shard_size": 512, "device": "cpu", "artifacts": str(store)},
    }
    return agreement(asked | {name: asked[name] | section for name, section in sections.items()})


def with_template(run: Path, folder: Path) -> Path:
    """The run, whose tokenizer has a chat template that the trainer did not use."""
    for name in ("checkpoint-6", "checkpoint-30"):
        shutil.copytree(run / name, folder / name)
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        tokenizer.chat_template = SWAPPED
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_right_sweep_is_rarely_blamed(record: Proof, demo_run: Path, tmp_path: Path):
    record(
        "A right sweep looks like its run",
        claim="The demo sweep with other seeds of E (512 sequences) and U, two checkpoints, against what the trainer "
        f"logged: {SEEDS} sweeps of 14 comparisons each.",
        limit=f"anything is called out in at most {MOST:.0%} of the sweeps",
        columns=("quantity", "mean z", "standard deviation of z", "largest |z|", "disagree"),
    )
    blamed, by_quantity = 0, {}
    for seed in range(SEEDS):
        found = rows(demo_run, tmp_path, batch_config={"E_batch_seed": 1000 + seed, "U_batch_seed": 2000 + seed})
        assert len(found) == 14
        blamed += bool(disagreements(found))
        for row in found:
            by_quantity.setdefault(row["quantity"], []).append(row)
    for quantity, of_one in by_quantity.items():
        z = [row["z"] for row in of_one if row["z"] is not None]
        odd = sum(row["verdict"] == "disagrees" for row in of_one)
        mean = sum(z) / len(z) if z else 0.0
        deviation = (sum((x - mean) ** 2 for x in z) / len(z)) ** 0.5 if z else 0.0
        record.row(quantity, f"{mean:+.2f}", f"{deviation:.2f}", f"{max(map(abs, z), default=0.0):.2f}", f"{odd}")
    record.note(
        f"Called out: {blamed} of {SEEDS}. All are held against one log, whose own noise they share, so the mean of z "
        "is not 0 and its standard deviation is below 1."
    )
    assert blamed <= MOST * SEEDS


def wrong(run: Path, folder: Path) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Sweeps with one mistake each."""
    folder.mkdir()
    (folder / "reward.py").write_text(REWARD)
    lines = [{"prompt": row["prompt"].replace("+", "+0"), "answer": row["answer"]} for row in problems("train", 512)]
    (folder / "others.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    templated = partial(rows, with_template(run, folder / "run"), folder / "artifacts")
    of_run = partial(rows, run, folder / "artifacts")
    return {
        "temperature 1.2 instead of 1": partial(of_run, generation={"temperature": 1.2}),
        "temperature 0.8 instead of 1": partial(of_run, generation={"temperature": 0.8}),
        "the length as the reward": partial(of_run, update={"reward": f"{folder / 'reward.py'}:length"}),
        "other prompts": partial(of_run, batch_config={"dataset_name": str(folder / "others.jsonl")}),
        "a chat template": partial(templated, batch_config={"apply_chat_template": True}),
    }


def test_wrong_sweeps_are_called_out(record: Proof, demo_run: Path, tmp_path: Path):
    record(
        "A wrong sweep does not look like its run",
        claim="The demo sweep (512 sequences in E) with one mistake, against what the trainer logged.",
        limit="each is called out",
        columns=("mistake", "disagree", "largest |z|", "said"),
    )
    missed = []
    for name, sweep in wrong(demo_run, tmp_path / "wrong").items():
        found = sweep()
        odd = [row for row in found if row["verdict"] == "disagrees"]
        largest = max((abs(row["z"]) for row in odd if row["z"] is not None), default=0.0)
        record.row(name, ", ".join(dict.fromkeys(row["quantity"] for row in odd)), f"{largest:.1f}", _advice(found))
        missed += [name] if not odd else []
    assert missed == []


def _advice(found: list[dict[str, Any]]) -> str:
    """The last sentences, about the likely cause."""
    return " ".join(disagreements(found)).rpartition("). ")[2]
