"""The step of the trainer: TRL really trains under each setting, and the probe predicts the change of the weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import skip_figures
from proofs import Proof, power
from trainer_fixtures import PROMPTS, G, held_against_the_trainer
from trainer_prompts import OF_GRPO as OF_PROMPTS_AND_REWARDS
from trainer_prompts import OF_RLOO as OF_RLOO_WITH_OWN

pytestmark = pytest.mark.validate

COSINE, RATIO, SAME = 1e-6, 1e-4, 0.97
HALVES = {"per_device_train_batch_size": PROMPTS * G // 2, "gradient_accumulation_steps": 2}
SEQUENCES = {"importance_sampling_level": "sequence"}
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "luspo": SEQUENCES,
    "cispo": {"epsilon_high": 5.0},
}
OF_GRPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} | more for name, more in LOSSES.items()},
    "cispo, a cap below 1": {"loss_type": "cispo"},
    "grpo, sequences": SEQUENCES,
    "dapo, sequences": {"loss_type": "dapo"} | SEQUENCES,
    "sapo, sequences": {"loss_type": "sapo"} | SEQUENCES,
    **{f"{name}, KL": {"loss_type": name, "beta": 0.1, "lora": {}} | more for name, more in LOSSES.items()},
    **{
        f"{name}, KL without the correction": {
            "loss_type": name,
            "beta": 0.1,
            "use_bias_correction_kl": False,
            "lora": {},
        }
        for name in ("grpo", "dapo", "dr_grpo", "bnpo")
    },
    "grpo, sequences, KL": SEQUENCES | {"beta": 0.1, "lora": {}},
    **{
        f"{name}, advantages by {by}": {"loss_type": name, "scale_rewards": by}
        for name in ("grpo", "dapo", "dr_grpo")
        for by in ("group", "batch", "none")
    },
    **{
        f"{name}, cut responses masked": {"loss_type": name, "mask_truncated_completions": True}
        for name in ("grpo", "dapo", "dr_grpo", "bnpo")
    },
    **{
        f"{name}, high entropies": {"loss_type": name, "top_entropy_quantile": 0.3}
        for name in ("grpo", "dapo", "bnpo", "cispo")
    },
    **{f"{name}, entropy bonus": {"loss_type": name, "entropy_coef": 0.05} for name in ("grpo", "dapo", "dr_grpo")},
    "grpo, adaptive bonus at work": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 100.0},
    "grpo, adaptive bonus that waits": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 0.0},
    "dapo, all of it": {
        "loss_type": "dapo",
        "top_entropy_quantile": 0.4,
        "entropy_coef": 0.05,
        "mask_truncated_completions": True,
        "beta": 0.1,
        "scale_rewards": "batch",
        "lora": {},
    },
    **{f"{name}, accumulated": {"loss_type": name} | HALVES for name in ("grpo", "dapo", "dr_grpo", "luspo")},
    "grpo, temperature 0.7": {"temperature": 0.7},
    "grpo, temperature 1.3": {"temperature": 1.3},
    "grpo, clipped": {"max_grad_norm": 0.02},
    "grpo, not clipped": {"max_grad_norm": 0.0},
    "grpo, clipped, accumulated, linear schedule, temperature 0.8": {
        "max_grad_norm": 0.02,
        "lr_scheduler_type": "linear",
        "temperature": 0.8,
    }
    | HALVES,
    "dapo, fused AdamW": {"loss_type": "dapo", "optim": "adamw_torch_fused", "adam_beta2": 0.95},
    "grpo, other Adam": {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "weight_decay": 0.0},
    "grpo, linear schedule": {"lr_scheduler_type": "linear"},
    "grpo, cosine schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    "the first step of a rollout": {"num_iterations": 2},  # of whose two steps the last of three is the first
    "grpo, checkpointed activations": {"gradient_checkpointing": True},
    "the embedding frozen": {"model": "the embedding frozen", "max_grad_norm": 0.02},
    "queries frozen": {"model": "queries frozen"},
    **{name: {"model": name, "router_aux_loss_coef": 0.0} for name in ("qwen2_moe", "mixtral", "qwen3_next")},
    **{name: {"model": name} for name in ("lfm2", "falcon_h1", "resized vocabulary", "LoRA+")},
    "LoRA of experts": {"model": "LoRA of experts", "router_aux_loss_coef": 0.0},
    "an adapter that was trained before, KL": {"model": "adapter of a supervised training", "beta": 0.1},
    "bfloat16": {"model": "bfloat16", "learning_rate": 1e-3},
    "lora": {"lora": {}},
    "lora, rank-stabilised": {"lora": {"use_rslora": True}},
    "lora, all linear layers": {"lora": {"target_modules": "all-linear"}},
    "lora, trained norms and head": {"lora": {"modules_to_save": ["norm", "lm_head"], "rank_pattern": {"up_proj": 2}}},
}
OF_RLOO: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "KL in the reward": {"beta": 0.1, "lora": {}},
    "normalised": {"beta": 0.0, "normalize_advantages": True},
    "clipped rewards": {"beta": 0.0, "reward_clip_range": (0.1, 0.4)},
    "cut responses masked": {"beta": 0.0, "mask_truncated_completions": True},
    "accumulated": {"beta": 0.0} | HALVES,
    "all of it": {"beta": 0.1, "normalize_advantages": True, "reward_clip_range": (0.1, 0.4), "lora": {}},
}


def test_the_step_is_the_trainers(record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(
        "The trainer's own step",
        claim="TRL trains a tiny policy under each setting, with a checkpoint after each step. The probe is given the "
        "run's folder and the batch of the last step, nothing else, and predicts the change of the weights, lr·v. "
        "Where a setting is of prompts, ends or rewards, it is given the responses alone: it makes the tokens of the "
        "same prompts, knows the tokens that end a response, and calls the same reward functions itself.",
        limit=f"cosine > 1 − {power(COSINE)}, norms within {power(RATIO)}; and not so without the gradient. With "
        f"weights in bfloat16, over {SAME:.0%} of those that move come to the same number, for the trainer rounds its "
        "gradient, too",
        columns=("trainer", "setting", "1 − cosine", "norm ratio − 1", "cosine without the gradient"),
    )
    skip_figures(monkeypatch)
    missed = []
    of_grpo, of_rloo = OF_GRPO | OF_PROMPTS_AND_REWARDS, OF_RLOO | OF_RLOO_WITH_OWN
    cases = [("GRPO", *case) for case in of_grpo.items()] + [("RLOO", *case) for case in of_rloo.items()]
    for number, (kind, name, settings) in enumerate(cases):
        found, without, done, _, same = held_against_the_trainer(tmp_path / str(number), {"kind": kind} | settings)
        record.row(kind, name, power(1 - found[0]), power(found[1] - 1), f"{without[0]:.4f}")
        agrees = found[0] > 1 - COSINE and abs(found[1] - 1) < RATIO
        if done.summary["rounded"]:  # the trainer's own gradient is in bfloat16
            agrees = same > SAME
        if not (agrees and without[0] < 1 - 1e-3):
            missed.append(f"{kind}: {name}")
    assert len(cases) >= 60 and not missed, missed


def test_what_dropout_does_is_as_large_as_measured(record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(
        "A step with dropout",
        claim="TRL trains with dropout in its adapter, which draws masks of its own. The distance of its step from v, "
        "relative to v, beside that of four draws, which the probe measures and warns of.",
        limit="within a factor of 1.5 of the mean of the draws",
        columns=("rate", "trainer", "smallest draw", "largest draw"),
    )
    skip_figures(monkeypatch)
    for rate in (0.05, 0.2):
        home = tmp_path / str(rate)
        (cosine, ratio), *_ = held_against_the_trainer(home, {"lora": {"lora_dropout": rate}})
        apart = math.sqrt(ratio**2 - 2 * ratio * cosine + 1)
        (manifest,) = (home / "artifacts" / "dropout-u").glob("*/manifest.json")
        draws = json.loads(manifest.read_text())["summary"]["relative_differences"]
        record.row(f"{rate}", f"{apart:.4f}", f"{min(draws):.4f}", f"{max(draws):.4f}")
        assert 1 / 1.5 < apart / (sum(draws) / len(draws)) < 1.5
