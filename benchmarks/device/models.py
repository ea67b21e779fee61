"""Random policies of the shapes that people train, on any device; and a small checkpoint on disk."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.model_shape import make_sequences
from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer
from entropy_core.policy.model import Policy
from entropy_core.prompts.arithmetic import problems
from entropy_core.sequences.batch import BatchedSequences

Training = Literal["full", "LoRA"]
RANK = 16


class Shape(NamedTuple):
    """A decoder as Llama and Qwen have it, with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int

    @property
    def width(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = 2 * self.hidden * (self.heads + self.key_value_heads) * self.width
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Numbers in all matrices; the embedding is the head."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary

    def flops(self, tokens: int, length: int) -> float:
        """Of a forward pass over sequences of a length, logits included: a product and a sum for each weight."""
        attention = 4 * self.layers * self.heads * self.width * length  # scores and their sums, masked ones included
        return tokens * (2.0 * self.parameters + attention)


TINY = Shape("tiny", 64, 2, 4, 2, 160, 512)
SMOLLM2 = Shape("135M (SmolLM2)", 576, 30, 9, 3, 1536, 49152)
QWEN = (
    Shape("0.5B (Qwen2.5)", 896, 24, 14, 2, 4864, 151936),
    Shape("1.5B (Qwen2.5)", 1536, 28, 12, 2, 8960, 151936),
    Shape("3B (Qwen2.5)", 2048, 36, 16, 2, 11008, 151936),
    Shape("7B (Qwen2.5)", 3584, 28, 28, 4, 18944, 152064),
    Shape("14B (Qwen2.5)", 5120, 48, 40, 8, 13824, 152064),
    Shape("32B (Qwen2.5)", 5120, 64, 40, 8, 27648, 152064),
)


def make_policy(
    shape: Shape,
    device: torch.device,
    training: Training = "full",
    dtype: torch.dtype = torch.float32,
    spread: float = 0,
) -> Policy:
    """A policy with random weights, made on the device; its responses never end by themselves.

    Args:
        shape: of the model.
        device: where it is.
        training: what is trained; "LoRA": adapters of rank 16 in every linear layer of the trunk.
        dtype: of the weights.
        spread: standard deviation of the weights; 0: what transformers takes, which makes nearly uniform policies.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2**17,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **({"initializer_range": spread} if spread else {}),
    )
    with torch.device("cpu" if spread else device):  # the same weights on every device where they are compared
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    if training == "LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    policy = Policy(model.to(device), SimpleNamespace(eos_token_id=None))
    policy.limit_logits(64)
    return policy


def make_batch(shape: Shape, sequences: int, length: int) -> BatchedSequences:
    """Random token ids of a shape's vocabulary: prompts of one token, responses that fill the length."""
    batch = make_sequences([length - 1] * sequences)
    names = ("prompt_tokens", "response_tokens_K")
    return replace(batch, **{name: getattr(batch, name) % shape.vocabulary for name in names})


def trainings() -> tuple[Training, ...]:
    """What can be measured here: adapters need peft."""
    return ("full", "LoRA") if find_spec("peft") else ("full",)


def write_checkpoint(directory: Path) -> Path:
    """What a trainer leaves of a small model after three steps of AdamW on worked additions."""
    tokenizer, model = (
        build_tokenizer(),
        build_model(DemoSettings(hidden_size=32, layers=2, heads=2, intermediate_size=48)),
    )
    trained = list(model.named_parameters())
    plain = [p for name, p in trained if "norm" in name]
    decayed = [p for name, p in trained if "norm" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    examples = [tokenizer(row["prompt"] + row["solution"])["input_ids"] for row in problems("train", 8)]
    for _ in range(3):
        optimizer.zero_grad()
        for ids in examples:
            ids_1L = torch.tensor([ids])
            (model(input_ids=ids_1L, labels=ids_1L).loss / len(examples)).backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 3}), encoding="utf-8")
    return directory
