"""Models of many kinds for TRL to train: what it is given, and how its step is compared with the predicted one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pipeline_fixtures import SHAPE
from test_architectures import DELTA, EXPERTS, GATED, MAMBA
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from entropy_core.demo.run import build_model, build_tokenizer

Made = tuple[Any, dict[str, Any]]  # a model, and further arguments of the trainer
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def of_architecture(name: str, **shape: Any) -> Made:
    """A tiny random model."""
    tokenizer = build_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = CONFIG_MAPPING[name](**GATED | {"max_position_embeddings": 64, "initializer_range": 0.05} | shape | tokens)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float(), {}


def partly_frozen(*parts: str) -> Made:
    """Without the parameters whose names have one of these parts in them."""
    model = build_model(SHAPE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model, {}


def _base(home: Path) -> Any:
    build_model(SHAPE).save_pretrained(home / "base")
    build_tokenizer().save_pretrained(home / "base")
    return AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)


def adapter_of_supervised_training(home: Path) -> Made:
    """A trained adapter, whose training goes on: TRL keeps a copy of it in `ref/`."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_base(home), LoraConfig(**ADAPTER))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, {}


def resized_vocabulary(home: Path) -> Made:
    """Tokens were added for the training, and the embeddings and the head are trained and saved."""
    from peft import LoraConfig, get_peft_model

    base = _base(home)
    base.resize_token_embeddings(base.config.vocab_size + 3)
    return get_peft_model(base, LoraConfig(**ADAPTER | {"modules_to_save": ["embed_tokens", "lm_head"]})), {}


def lora_plus(home: Path) -> Made:
    """With a learning rate of its own for the B factors."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(_base(home), LoraConfig(**ADAPTER))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    return model, {"optimizers": (optimizer, None)}


def lora_of_experts(home: Path) -> Made:
    """LoRA on bare parameters: the weights of all experts of a layer in one tensor."""
    from peft import LoraConfig, get_peft_model

    base, _ = of_architecture("qwen2_moe", **EXPERTS)
    base.save_pretrained(home / "base")
    build_tokenizer().save_pretrained(home / "base")
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    own = ADAPTER | {"target_modules": ["q_proj"], "target_parameters": parameters, "lora_dropout": 0.0}
    model = get_peft_model(base, LoraConfig(**own))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, {}


MODELS: dict[str, Callable[[Path], Made]] = {
    "bfloat16": lambda home: (build_model(SHAPE).bfloat16(), {}),
    "the embedding frozen": lambda home: partly_frozen("embed_tokens"),
    "queries frozen": lambda home: partly_frozen("q_proj"),
    "qwen2_moe": lambda home: of_architecture("qwen2_moe", **EXPERTS),
    "mixtral": lambda home: of_architecture("mixtral", **EXPERTS),
    "qwen3_next": lambda home: of_architecture("qwen3_next", **EXPERTS | DELTA),
    "lfm2": lambda home: of_architecture("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3),
    "falcon_h1": lambda home: of_architecture("falcon_h1", **MAMBA | {"mamba_d_ssm": 32}),
    "adapter of a supervised training": adapter_of_supervised_training,
    "resized vocabulary": resized_vocabulary,
    "LoRA+": lora_plus,
    "LoRA of experts": lora_of_experts,
}


def same_after_rounding(before: dict[str, Any], after: dict[str, Any], step: dict[str, Any]) -> float:
    """Of the weights that move, really or as predicted, the share that moves to the same number."""
    moved = same = 0
    for name, old in before.items():
        found = (old.double() + step[name]).to(old.dtype)
        moves = (after[name] != old) | (found != old)
        moved += int(moves.sum())
        same += int((moves & (found == after[name])).sum())
    return same / moved
