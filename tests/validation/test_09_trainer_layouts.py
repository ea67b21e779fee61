"""Whole sweeps from the files of trainers that shard: the numbers of a plain checkpoint of the same state."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import probe, skip_figures, values
from proofs import Proof, power
from safetensors.torch import save_file
from trainer_layouts import written
from transformers import LlamaConfig

from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.demo.run import build_tokenizer

pytestmark = pytest.mark.validate

LIMIT = 1e-9
OTHERS = Path(__file__).parents[1] / "of_other_writers"
OF_TORCH = {
    "FSDP, full state dict": "fsdp_full",
    "FSDP, sharded state dict (DCP)": "fsdp_sharded",
    "accelerate's save_state": "accelerate",
    "verl": "verl/global_step_2",
    "SkyRL": "skyrl/global_step_2",
    "NeMo-RL (DCP)": "nemo_rl/step_2",
    "prime-rl (DCP)": "prime_rl/step_2",
    "torchtitan (DCP)": "titan/step-2",
}


def measured(folder: Path, checkpoint: Path, **sections: Any) -> dict[str, float]:
    """H, δH₁ and ΔH of one checkpoint."""
    config = values(folder, folder / "artifacts", checkpoints=[str(checkpoint)], **sections)
    row = next(row for row in probe(config).rows if row["eta_over_lr"] == 1)
    return {name: row[name] for name in ("H", "delta_h1", "delta_h")}


def difference(found: dict[str, float], truth: dict[str, float]) -> float:
    return max(abs(found[name] - truth[name]) / abs(truth[name]) for name in truth)


def zero(stage: int, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of DeepSpeed, and one of the Trainer with the same float32 weights, moments and groups."""
    sharded = Path(shutil.copytree(OTHERS / f"zero{stage}", folder / f"zero{stage}" / "checkpoint-2"))
    plain = folder / f"plain{stage}" / "checkpoint-2"
    truth = torch.load(sharded / "truth.pt", weights_only=True)
    (sharded / "truth.pt").unlink()
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False, eos_token_id=1, bos_token_id=None, pad_token_id=0)
    saved = open_state(sharded / "global_step2").optimizer()
    for directory in (sharded, plain):
        config.save_pretrained(directory)
        build_tokenizer().save_pretrained(directory)
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    save_file({name: weight.contiguous() for name, (_, weight) in truth.items()}, plain / "model.safetensors")
    slots = {name: {"step": slot["step"]} for name, slot in saved.slots.items()}
    for name, slot in saved.slots.items():
        moment = truth[name][0] if truth[name][0].numel() else slot["exp_avg"].whole()
        slots[name] |= {"exp_avg": moment, "exp_avg_sq": slot["exp_avg_sq"].whole()}
    torch.save({"state": slots, "param_groups": saved.groups}, plain / "optimizer.pt")
    return sharded, plain


def test_sharded_checkpoints_give_the_numbers_of_a_plain_one(
    record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record(
        "Checkpoints of trainers that shard",
        claim="The same state as each trainer saves it, by torch's and DeepSpeed's own writers on two ranks, and as "
        "one plain checkpoint: a whole sweep of each gives the same H, δH₁ and ΔH.",
        limit=f"largest relative difference < {power(LIMIT)}",
        columns=("layout", "largest relative difference", "δH₁"),
    )
    skip_figures(monkeypatch)
    trainers = written(tmp_path / "trainers")
    plain = trainers / "plain" / "checkpoint-2"
    truth = measured(tmp_path, plain)
    missed = []
    for layout, where in OF_TORCH.items():
        described = {} if (trainers / where / "config.json").exists() else {"policy": {"base_model": str(plain)}}
        found = measured(tmp_path, trainers / where, **described)
        record.row(layout, power(difference(found, truth)), f"{found['delta_h1']:.6g}")
        missed += [layout] * (difference(found, truth) >= LIMIT)
    for stage in (2, 3):
        sharded, same = zero(stage, tmp_path)
        found, truth = measured(tmp_path, sharded), measured(tmp_path, same)
        record.row(f"DeepSpeed, ZeRO-{stage}", power(difference(found, truth)), f"{found['delta_h1']:.6g}")
        missed += [f"ZeRO-{stage}"] * (difference(found, truth) >= LIMIT)
    assert not missed, missed
