"""The trainer's own next step: TRL takes it on a batch, and the probe, told nothing but the run, predicts it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import skip_figures
from trainer_fixtures import PROMPTS, G, held_against_the_trainer
from trainer_prompts import BOS, CHATS, NORMALISED, SEMICOLON, SEVERAL, WEIGHTS

CASES: dict[str, dict[str, Any]] = {  # settings of the trainer, one or two of each kind; the proof has over a hundred
    "full, clipped, accumulated, on a schedule": {
        "max_grad_norm": 0.02,
        "per_device_train_batch_size": PROMPTS * G // 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "temperature": 0.8,
    },
    "full, luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "max_grad_norm": 0.02},
    "full, divided by the batch": {"scale_rewards": "batch"},
    "full, a BOS, another EOS": {"own": BOS._replace(ends=[SEMICOLON])},
    "full, conversations": {"own": CHATS, "chat_template_kwargs": {"hint": True}},
    "full, several rewards, normalised one by one": {"own": SEVERAL} | WEIGHTS | NORMALISED,
    "partly frozen, clipped": {"model": "queries frozen", "max_grad_norm": 0.02},
    "lora, on a trained adapter": {"model": "adapter of a supervised training", "beta": 0.1},
    "lora, of experts": {"model": "LoRA of experts", "router_aux_loss_coef": 0.0},
    "lora, clipped, with norms and the head": {
        "lora": {"modules_to_save": ["norm", "lm_head"], "rank_pattern": {"up_proj": 2}},
        "max_grad_norm": 0.02,
        "loss_type": "dapo",
    },
}


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    skip_figures(monkeypatch)
    yield


@pytest.mark.parametrize("case", CASES)
def test_v_is_the_step_that_the_trainer_takes(tmp_path: Path, case: str):
    (cosine, ratio), (without_g, _), done, lr, _ = held_against_the_trainer(tmp_path, CASES[case])
    assert cosine > 1 - 1e-6 and abs(ratio - 1) < 1e-4
    assert without_g < 1 - 1e-3  # the comparison can fail: momentum and decay alone are another step
    assert (done.summary["clip_factor"] < 0.5) == ("max_grad_norm" in CASES[case])
    if "schedule" in case:
        assert lr == pytest.approx(1e-2 / 3)


def test_weights_in_bfloat16_go_where_the_trainer_puts_them(tmp_path: Path):
    """But for those few whose gradient, which the trainer computes in bfloat16 as well, tips them to a neighbour."""
    (cosine, ratio), _, done, _, same = held_against_the_trainer(tmp_path, {"model": "bfloat16", "learning_rate": 1e-3})
    assert cosine > 0.99 and abs(ratio - 1) < 1e-2 and same > 0.97
    assert done.summary["rounded"] and 0.3 < done.summary["moved_fraction"] < 0.95
