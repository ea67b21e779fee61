"""The architectures that people train, small and random: sampled, scored and differentiated as the model computes them.

The oracle is the model itself, one whole sequence at a time: its full logits, without padding, cache, chunks or head.
Forward mode runs in float32, as in a sweep; the central differences that it is held to are taken in float64.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from conftest import COMMON, policy_of, random_direction
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from entropy_core.errors import CheckpointError
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.decoding import Decoding
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

V, EOS, TAU, LONGEST = 11, 10, 0.8, 8
POOL = [[1], [2, 0], [3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 0, 0], [EOS, 4]]  # 0 is the padding, too
TOLERANCE = 1e-3  # of the derivatives, relative; the values are held to a hundredth of it

PLAIN = {"vocab_size": V, "eos_token_id": EOS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = PLAIN | {"intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 4}
LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 4}
EXPERTS = GATED | {
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    **{"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
}
MAMBA = {f"mamba_{key}": value for key, value in {"n_heads": 4, "d_head": 8, "n_groups": 1, "d_state": 4}.items()}
MAMBA |= {"mamba_expand": 2, "mamba_chunk_size": 4}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": GATED | LOCAL | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": GATED | LOCAL | {"initializer_range": 0.2},
    "gpt2": {"vocab_size": V, "eos_token_id": EOS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gpt_neox": PLAIN | {"intermediate_size": 24, "max_position_embeddings": 32},
    "phi3": GATED,
    "mistral": GATED | {"sliding_window": 3},
    "opt": PLAIN | {"ffn_dim": 24, "word_embed_proj_dim": 12, "max_position_embeddings": 32, "init_std": 0.4},
    "cohere": GATED | {"logit_scale": 0.5},
    "granite": GATED | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    # mixtures of experts
    "qwen2_moe": EXPERTS,
    "mixtral": EXPERTS | {"initializer_range": 0.3},
    # states in place of attention, or beside it
    "mamba2": PLAIN | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "jamba": GATED
    | {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"use_mamba_kernels": False},
    "qwen3_next": EXPERTS | DELTA,
    "lfm2": GATED | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "falcon_h1": GATED | MAMBA | {"mamba_d_ssm": 32},
    "hyperclovax": GATED | {"logits_scaling": 0.4},  # multiplies where granite divides: not what the head expects
}
matrix = pytest.mark.parametrize("name", ARCHITECTURES)


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    config = CONFIG_MAPPING[name](**COMMON | {"initializer_range": 0.5} | ARCHITECTURES[name])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **eager).float()


def processor(policy: Policy, **sizes: int) -> SequenceProcessor:
    return SequenceProcessor(policy, GenerationConfig(TAU, LONGEST, **sizes))


def sampled(policy: Policy) -> BatchedSequences:
    """Responses to prompts of 1 to 9 tokens, decoded together: with padding on the left, and rows that are refilled."""
    return processor(policy, gen_batch_size=9).generate_with_logprobs(POOL, 4, seed=1)[0]


def own_logits(model: PreTrainedModel, sequences: BatchedSequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each sequence its response, and the model's own logits [T, V] that predict it."""
    for i in range(len(sequences)):
        prompt, response = sequences.prompt(i), sequences.response(i)
        logits_LV = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        yield response, logits_LV[len(prompt) - 1 : -1]


def plain(model: PreTrainedModel, sequences: BatchedSequences) -> tuple[Tensor, Tensor]:
    """ℓ and h of all response tokens from these logits."""
    logprobs, entropies = [], []
    for response, logits_TV in own_logits(model, sequences):
        logp_TV = torch.log_softmax(logits_TV / TAU, dim=-1)
        logprobs.append(logp_TV.gather(1, response[:, None])[:, 0])
        entropies.append(-(logp_TV.exp() * logp_TV).sum(dim=-1))
    return torch.cat(logprobs), torch.cat(entropies)


class Float64(TorchFunctionMode):
    """Where an architecture goes down to float32 by name, for norms, attention weights and angles, it does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = Tensor.double if function is Tensor.float else function
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def slopes(model: PreTrainedModel, v: dict[str, Tensor], sequences: BatchedSequences) -> Tensor:
    """Central differences of `plain` along v, in float64; their step is so short that no ReLU turns within it."""
    policy, step = policy_of(copy.deepcopy(model).double()), 1e-7
    values = []
    with torch.no_grad(), Float64():
        for sign in (1, -1):
            with moves.moved(policy, v, sign * step):
                values.append(torch.stack(plain(policy.model, sequences)))
    return (values[0] - values[1]) / (2 * step)


def difference(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|, in the Euclidean norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@matrix
def test_every_architecture_is_one_function(
    name: str,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    with caplog.at_level(logging.WARNING):
        policy = policy_of(model_of(name), head_chunk_rows=7)
    known = name != "hyperclovax"
    assert policy.scorer.head_is_known == known and ("using full logits" in caplog.text) != known

    seen: dict[tuple[int, int], Tensor] = {}
    draw = Decoding._draw

    def recorded(decoding: Decoding, rows: Sequence[int], logits_RV: Tensor, uniforms_R: Tensor) -> Tensor:
        for row, logits_V in zip(rows, logits_RV, strict=True):
            seen[decoding.batch.sequences[row], len(decoding.batch.tokens[row])] = logits_V
        return draw(decoding, rows, logits_RV, uniforms_R)

    monkeypatch.setattr(Decoding, "_draw", recorded)
    sequences = sampled(policy)
    assert len(sequences.lengths_N.unique()) > 2 and set(sequences.finish_reasons) == {"eos", "length"}

    with torch.no_grad():
        own = [logits_TV for _, logits_TV in own_logits(policy.model, sequences)]
        values = plain(policy.model, sequences)
    decoded = torch.stack([seen[i, k] for i, logits_TV in enumerate(own) for k in range(len(logits_TV))])
    scored, _ = processor(policy, tf_batch_size=5).score(sequences)

    v = random_direction(policy)
    expected = slopes(policy.model, v, sequences)
    columns = processor(policy, tf_batch_size=5).map_tokens(
        sequences, lambda rows: token_derivatives(policy, rows, v, TAU)
    )
    measured = {
        "decoding": difference(decoded, torch.cat(own)),
        "ℓ": difference(scored.logprobs_K, values[0]),
        "h": difference(scored.entropies_K, values[1]),
        "ℓ̇": difference(columns[2], expected[0]),
        "ḣ": difference(columns[3], expected[1]),
    }
    row = f"{name:12}" + "".join(f"  {what} {value:.1e}" for what, value in measured.items())
    print(row)
    record_property("relative differences", row)
    assert max(measured["ℓ̇"], measured["ḣ"]) < TOLERANCE, row
    assert max(measured["decoding"], measured["ℓ"], measured["h"]) < TOLERANCE / 100, row


def test_an_operation_without_a_forward_derivative_is_refused_by_name():
    config = CONFIG_MAPPING["bloom"](vocab_size=V, hidden_size=16, n_layer=1, n_head=2, eos_token_id=EOS)
    policy = policy_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    sequences = sampled(policy)
    with pytest.raises(CheckpointError, match="BloomForCausalLM has no forward-mode derivative"):
        v = random_direction(policy)
        processor(policy).map_tokens(sequences, lambda rows: token_derivatives(policy, rows, v, TAU))
