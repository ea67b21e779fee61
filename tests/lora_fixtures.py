"""LoRA checkpoints as PEFT and torch's AdamW leave them, in both layouts.

make_base    a GPT-2 with tied embeddings, in which float64 is float64 throughout, without a training
make_lora    an adapter on it after three steps, as the Trainer saves it, or with the model in a folder of its own
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pipeline_fixtures import LEARNING_RATE, train
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from entropy_core.demo.run import build_tokenizer

STEPS = 3
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def make_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A base model with its tokenizer."""
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(build_tokenizer())}
    tokens = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(**shape | tokens | {"initializer_range": 0.1} | changes)).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def with_adapter(model: torch.nn.Module, **lora: Any) -> PeftModel:
    """A model under training, without PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**LORA | {"task_type": "CAUSAL_LM"} | lora))


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Without PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What the trainer trains, by its own names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_lora(directory: Path, base: Path, layout: str = "trainer", **lora: Any) -> Path:
    """An adapter after three steps, with its optimizer.

    Args:
        directory: of the checkpoint.
        base: directory of the base model.
        layout: `trainer`, or `folder`: the adapter in `model/`, `training_info.json`, and a single param group in an
            order of its own, whose names are in `optimizer_param_names.json`.
        lora: changes of `LORA`.
    """
    torch.manual_seed(1)
    model = with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), **lora)
    names = list(reversed(trained(model)))
    own_group = [trained(model)[name] for name in names]
    *_, (step, optimizer) = train(model, STEPS, None if layout == "trainer" else own_group)
    within = directory if layout == "trainer" else directory / "model"
    within.mkdir(parents=True)
    save_adapter(model, within)
    build_tokenizer().save_pretrained(within)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    if layout == "trainer":
        write_json(directory / "trainer_state.json", {"global_step": step})
    else:
        write_json(directory / "optimizer_param_names.json", names)
        write_json(directory / "training_info.json", {"step": step, "learning_rate": LEARNING_RATE})
    return directory


def write_json(path: Path, content: Any) -> None:
    """What a trainer says about itself."""
    path.write_text(json.dumps(content))
