"""Every layout and every kind of moment, tensor by tensor, and the next step from it, against its own writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs import Proof, power
from safetensors.torch import load_file
from torch import Tensor
from trainer_layouts import OTHERS, deepspeed, truth_of_deepspeed, weights_in, whole, written, written_lora

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.checkpoint import Checkpoint, read_checkpoint
from entropy_core.checkpoints.optimizer_file import SavedMoments, load_optimizer
from entropy_core.checkpoints.optimizer_state import OptimizerState
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep

pytestmark = pytest.mark.validate

STEP, STEP_IN_CODES = 1e-12, 1e-6
FSDP2 = {
    "the Trainer": "plain/checkpoint-2",
    "FSDP, full state dict": "fsdp_full",
    "FSDP, sharded state dict (DCP)": "fsdp_sharded",
    "accelerate's save_state": "accelerate",
    "verl (FSDP2)": "verl/global_step_2",
    "SkyRL (FSDP2)": "skyrl/global_step_2",
    "NeMo-RL (DCP)": "nemo_rl/step_2",
    "prime-rl (DCP)": "prime_rl/step_2",
    "torchtitan (DCP)": "titan/step-2",
}
FSDP1 = {"verl (FSDP1, DTensor)": "fsdp1", "verl (FSDP1, ShardedTensor)": "sharded_tensors"}
LORA = {
    "FSDP, full state dict, LoRA": "fsdp_full/checkpoint-2",
    "FSDP, sharded state dict (DCP), LoRA": "fsdp_sharded/checkpoint-2",
    "verl (FSDP2), LoRA": "verl/global_step_2",
}
OF_CODES = {
    "bitsandbytes, AdamW in 8 bits": "bitsandbytes_adamw8bit.pt",
    "torchao, AdamW in 8 bits": "torchao_adamw8bit.pt",
    "torchao, AdamW in 4 bits": "torchao_adamw4bit.pt",
}
Moments = Mapping[str, Mapping[str, Tensor]]  # key → name → moment


def apart(pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """How many tensors were compared, and how many differ in a bit, in shape or in dtype."""
    return len(pairs), sum(a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def of_moments(found: OptimizerState, truth: Moments) -> list[tuple[Tensor, Tensor]]:
    return [(whole(found.moments[key][name]), moment) for key, of in truth.items() for name, moment in of.items()]


def of_weights(found: Checkpoint, truth: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tied weights have one copy in a file of safetensors, and may have two in shards."""
    if found.layout.shards is None:
        return []
    weights = weights_in(found.layout.shards)
    assert truth.keys() <= weights.keys()
    head = truth.get("lm_head.weight", truth.get("model.embed_tokens.weight"))
    return [(tensor, truth.get(name, head)) for name, tensor in weights.items()]


def next_step(found: OptimizerState) -> float:
    """lr·v against the change that torch's AdamW makes in float64, relative to its norm: the largest error."""
    generator, errors = torch.Generator().manual_seed(0), [0.0]
    for group in found.groups:
        h = group.hyperparameters
        for name in group.names:
            moments = {key: whole(found.moments[key][name]).double() for key in ("exp_avg", "exp_avg_sq")}
            theta, g = (torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in moments.values())
            parameter = torch.nn.Parameter(theta.clone())
            settings: dict[str, Any] = {"betas": (h.beta1, h.beta2), "eps": h.eps, "weight_decay": h.weight_decay}
            optimizer = torch.optim.AdamW([parameter], lr=found.learning_rate, **settings)
            optimizer.state[parameter] = {
                "step": torch.tensor(float(found.step[name])),
                **{key: moment.clone() for key, moment in moments.items()},
            }
            parameter.grad = g
            optimizer.step()
            change = parameter.detach() - theta
            step = NextStep(g, theta, AdamState(found.step[name], **moments), h).direction
            errors.append(float((found.learning_rate * step - change).norm() / change.norm()))
    return max(errors)


def from_codes(path: Path) -> float:
    """lr·v against the change that the optimizer itself made next of float32 parameters: the largest difference."""
    found, moments = load_optimizer(path), SavedMoments(path)
    (group,) = found.groups
    h = AdamHyperparameters(*group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
    generator, errors = torch.Generator().manual_seed(99), []
    truth = read_archive(path)["next_step"]
    for slot, (before, after) in enumerate(zip(truth["before"], truth["after"], strict=True)):
        theta, moved = (stored.flat(0, stored.numel()).double() for stored in (before, after))
        g = torch.randn(before.shape, generator=generator).double().view(-1)
        read: list[Any] = [moments.read(slot, key, 0, theta.numel()) for key in ("exp_avg", "exp_avg_sq")]
        step = NextStep(g, theta, AdamState(int(found.slots[slot]["step"]), *read), h).direction
        errors.append(float((moved - theta - float(group["lr"]) * step).abs().max()))
    return max(errors)


def test_every_tensor_is_the_one_that_was_saved(record: Proof, tmp_path: Path) -> None:
    record(
        "Trainers' files, tensor by tensor",
        claim="Names, shapes, moments and weights as each trainer's own writer saved them (torch's FSDP2, FSDP1 and "
        "DCP on 2 ranks, and on 3 with tied embeddings, shards of several sizes, two param groups; PEFT's LoRA; "
        "DeepSpeed, bitsandbytes and torchao from small files of theirs), against the same state gathered; and lr·v "
        "from them against the step that the optimizer takes next, in float64. Of moments in codes: against the "
        "change of float32 parameters of order 1 that the optimizer itself made.",
        limit=f"no tensor differs in a bit; step < {power(STEP)} of its norm, {power(STEP_IN_CODES)} from codes",
        columns=("layout", "ranks", "tensors", "different", "step"),
    )
    missed: list[str] = []

    def row(layout: str, ranks: int | str, pairs: list[tuple[Tensor, Tensor]], step: float, limit: float) -> None:
        compared, different = apart(pairs)
        record.row(layout, ranks, compared or "", different if compared else "", power(step))
        missed.extend([layout] * bool(different or step >= limit))

    for ranks in (2, 3):
        trainers = written(tmp_path / f"trainers{ranks}", ranks, tied=ranks == 3)
        plain = trainers / "plain" / "checkpoint-2"
        truth, weights = read_checkpoint(plain), load_file(plain / "model.safetensors")
        for layout, where in FSDP2.items():
            found = read_checkpoint(trainers / where, base_model=plain)
            assert found.parameter_shapes == truth.parameter_shapes and found.optimizer.step == truth.optimizer.step
            pairs = of_moments(found.optimizer, truth.optimizer.moments) + of_weights(found, weights)  # type: ignore[arg-type]
            row(layout, ranks, pairs, next_step(found.optimizer), STEP)
        for layout, name in FSDP1.items():
            found = read_checkpoint(trainers / name / "global_step_2", base_model=plain)
            slots = torch.load(trainers / f"truth_{name}.pt", weights_only=True)
            moments = {key: {of: slot[key] for of, slot in slots.items()} for key in ("exp_avg", "exp_avg_sq")}
            saved = torch.load(trainers / f"weights_{name}.pt", weights_only=True)
            pairs = of_moments(found.optimizer, moments) + of_weights(found, saved)
            row(layout, ranks, pairs, next_step(found.optimizer), STEP)
        adapters = written_lora(tmp_path / f"adapters{ranks}", ranks)
        truth = read_checkpoint(adapters / "plain" / "checkpoint-2")
        for layout, where in LORA.items():
            found = read_checkpoint(adapters / where)
            assert found.parameter_shapes == truth.parameter_shapes and found.optimizer.step == truth.optimizer.step
            row(layout, ranks, of_moments(found.optimizer, truth.optimizer.moments), next_step(found.optimizer), STEP)  # type: ignore[arg-type]
        found = read_checkpoint(adapters / "fsdp1" / "global_step_2")
        slots = torch.load(adapters / "truth_fsdp1.pt", weights_only=True)
        factors = {name.removeprefix("base_model.model."): slot for name, slot in slots.items() if ".lora_" in name}
        moments = {key: {name: slot[key] for name, slot in factors.items()} for key in ("exp_avg", "exp_avg_sq")}
        row("verl (FSDP1), LoRA", ranks, of_moments(found.optimizer, moments), next_step(found.optimizer), STEP)
    of_stage: dict[str, OptimizerState] = {}
    for kind in ("zero2", "zero3", "universal2", "universal3", "zero3_groups"):
        found = read_checkpoint(deepspeed(kind, tmp_path / kind))
        masters = truth_of_deepspeed(kind)
        of_stage[kind] = found.optimizer
        pairs = of_weights(found, {name: weight for name, (_, weight) in masters.items()})
        if "3" in kind:  # of stage 2 DeepSpeed gathered no moments
            pairs += of_moments(found.optimizer, {"exp_avg": {name: moment for name, (moment, _) in masters.items()}})
        if kind.startswith("universal"):
            original = of_stage[f"zero{kind[-1]}"].moments
            gathered = {key: {name: whole(moment) for name, moment in of.items()} for key, of in original.items()}
            pairs += of_moments(found.optimizer, gathered)
        said = {"universal": ", universal", "zero3_groups": ", in several flat tensors"}
        how = next((of for name, of in said.items() if kind.startswith(name)), "")
        row(f"DeepSpeed, ZeRO-{3 if '3' in kind else 2}{how}", 2, pairs, next_step(found.optimizer), STEP)
    for layout, file in OF_CODES.items():
        row(layout, "", [], from_codes(OTHERS / file), STEP_IN_CODES)
    assert not missed, missed
