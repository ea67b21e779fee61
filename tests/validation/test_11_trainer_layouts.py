"""Whole sweeps from the files of trainers that shard: the numbers of a plain checkpoint of the same state."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_fixtures import make_base
from pipeline_fixtures import probe, skip_figures, values
from proofs import Proof, power
from safetensors.torch import save_file
from trainer_layouts import OTHERS, deepspeed, truth_of_deepspeed, whole, written, written_lora

from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.optimizer_file import load_optimizer
from entropy_core.checkpoints.optimizer_settings import RULE
from entropy_core.demo.run import build_tokenizer

pytestmark = pytest.mark.validate

LIMIT = 1e-9
OF_DEEPSPEED = {
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "universal2": "ZeRO-2, universal",
    "universal3": "ZeRO-3, universal",
}
OF_LORA = {
    "FSDP, full state dict": "fsdp_full/checkpoint-2",
    "FSDP, sharded state dict (DCP)": "fsdp_sharded/checkpoint-2",
    "verl": "verl/global_step_2",
}
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


def zero(kind: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of DeepSpeed, and one of the Trainer with the same float32 weights, moments and groups."""
    sharded, plain = deepspeed(kind, folder / kind), folder / f"plain_{kind}" / "checkpoint-2"
    shutil.copytree(sharded, plain, ignore=lambda *_: [path.name for path in sharded.iterdir() if path.is_dir()])
    for directory in (sharded, plain):
        build_tokenizer().save_pretrained(directory)
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    truth = truth_of_deepspeed(kind)
    save_file({name: weight.contiguous() for name, (_, weight) in truth.items()}, plain / "model.safetensors")
    place = find_layout(sharded).optimizer
    assert place is not None
    moments = {name: moment for name, (moment, _) in truth.items() if moment.numel()}
    return sharded, _plain(plain, place, moments)


def _plain(directory: Path, place: Path, exp_avg: Mapping[str, torch.Tensor]) -> Path:
    """Put the state of an optimizer into an optimizer.pt, with first moments from elsewhere where there are some."""
    saved = load_optimizer(place)
    slots = {
        index: {key: whole(value) if hasattr(value, "shape") else value for key, value in slot.items()}
        for index, slot in saved.slots.items()
    }
    for name, moment in exp_avg.items():
        slots[name]["exp_avg"] = moment
    groups = [{key: value for key, value in group.items() if key != RULE} for group in saved.groups]
    torch.save({"state": slots, "param_groups": groups}, directory / "optimizer.pt")
    return directory


def fsdp1(trainers: Path) -> tuple[Path, Path]:
    """A checkpoint of verl under FSDP1, and one of the Trainer of the same state as FSDP gathers it."""
    sharded, plain = trainers / "fsdp1" / "global_step_2", trainers / "plain_fsdp1" / "checkpoint-2"
    described = shutil.ignore_patterns("model.safetensors", "optimizer.pt")
    shutil.copytree(trainers / "plain" / "checkpoint-2", plain, ignore=described)
    weights = torch.load(trainers / "weights_fsdp1.pt", weights_only=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, plain / "model.safetensors")
    slots = torch.load(trainers / "truth_fsdp1.pt", weights_only=True)
    return sharded, _plain(plain, sharded / "actor", {name: slot["exp_avg"] for name, slot in slots.items()})


def lora_in_codes(folder: Path) -> tuple[Path, Path]:
    """An adapter with 8-bit moments of bitsandbytes, and the same with float32 moments."""
    codes = Path(shutil.copytree(OTHERS / "lora_adamw8bit", folder / "codes" / "checkpoint-3"))
    plain = Path(shutil.copytree(codes, folder / "plain_codes" / "checkpoint-3"))
    return codes, _plain(plain, codes / "optimizer.pt", {})


def test_sharded_checkpoints_give_the_numbers_of_a_plain_one(
    record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record(
        "Checkpoints of trainers that shard",
        claim="The same state as each trainer saves it, by torch's, PEFT's, DeepSpeed's and bitsandbytes' own writers "
        "(sharded ones on two ranks), and as one plain checkpoint with float32 moments: a whole sweep of each gives "
        "the same H, δH₁ and ΔH.",
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
    adapters = written_lora(tmp_path / "adapters")
    base = make_base(tmp_path / "base")
    others: dict[str, tuple[tuple[Path, Path], str]] = {"verl (FSDP1)": (fsdp1(trainers), str(plain))}
    others |= {f"DeepSpeed, {said}": (zero(kind, tmp_path), "") for kind, said in OF_DEEPSPEED.items()}
    of_lora = adapters / "plain" / "checkpoint-2"
    others |= {f"{layout}, LoRA": ((adapters / where, of_lora), "") for layout, where in OF_LORA.items()}
    others["bitsandbytes, LoRA with moments in 8 bits"] = lora_in_codes(tmp_path), str(base)
    of_plain: dict[Path, dict[str, float]] = {}
    for layout, ((checkpoint, same), home) in others.items():
        described = {"policy": {"base_model": home}} if home else {}
        if same not in of_plain:
            of_lone_model = home == str(plain)
            of_plain[same] = measured(tmp_path, same, **({} if of_lone_model else described))
        found, truth = measured(tmp_path, checkpoint, **described), of_plain[same]
        record.row(layout, power(difference(found, truth)), f"{found['delta_h1']:.6g}")
        missed += [layout] * (difference(found, truth) >= LIMIT)
    assert not missed, missed
