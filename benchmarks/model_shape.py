"""The model of the benchmarks: SmolLM2-135M-Instruct, or random weights in its shape where it is not installed.

Where there is a GPU it is a random model of the shape of Qwen2.5-0.5B: the small one would leave it idle.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from entropy_core.numerics import ragged
from entropy_core.policy.model import Policy
from entropy_core.policy.pretrained import load_policy, resolve_device
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

INSTALLED = Path("artifacts/smollm2/model")
SMOLLM2_135M = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
QWEN25_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
EOS = 2
VOCABULARY = SMOLLM2_135M["vocab_size"]  # of the tokens in the sequences
HEAD_MEGABYTES = 64.0  # the default of execution.head_chunk_megabytes


def name() -> str:
    """Which model it is."""
    if torch.cuda.is_available():
        return "random weights in the shape of Qwen2.5-0.5B"
    return "SmolLM2-135M-Instruct" if INSTALLED.exists() else "random weights in the shape of SmolLM2-135M"


def make_policy(dtype: str = "float32") -> Policy:
    """The policy, on the GPU where there is one, with the attention that the probe uses."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    if INSTALLED.exists() and not on_gpu:
        policy = load_policy(INSTALLED, "", dtype, "blockwise", "auto")
    else:
        config = LlamaConfig(
            **(QWEN25_05B if on_gpu else SMOLLM2_135M), tie_word_embeddings=True, max_position_embeddings=8192
        )
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="eager")
        policy = Policy(model.to(resolve_device("auto")), SimpleNamespace(eos_token_id=EOS))
    policy.model.generation_config.eos_token_id = EOS
    policy.limit_logits(HEAD_MEGABYTES)
    return policy


def make_sequences(lengths: list[int], prompt_length: int = 1) -> BatchedSequences:
    """Random token ids: a prompt and a response of each of the lengths."""
    generator = torch.Generator().manual_seed(0)
    N, K = len(lengths), sum(lengths)
    lengths_N = torch.tensor(lengths)
    return BatchedSequences(
        sequence_ids_N=torch.arange(N),
        prompt_ids_N=torch.arange(N),
        draws_N=torch.zeros(N, dtype=torch.long),
        prompt_tokens=torch.randint(3, VOCABULARY, (N * prompt_length,), generator=generator),
        prompt_offsets_N1=torch.arange(N + 1) * prompt_length,
        response_tokens_K=torch.randint(3, VOCABULARY, (K,), generator=generator),
        response_offsets_N1=ragged.offsets_from_lengths(lengths_N),
        finish_reasons=("length",) * N,
    )


def make_processor(
    policy: Policy, micro_batch: int = 16, max_new_tokens: int = 128, gen_batch_size: int = 64
) -> SequenceProcessor:
    """A processor of the law that the policy is."""
    return SequenceProcessor(policy, GenerationConfig(1.0, max_new_tokens, gen_batch_size, micro_batch))
