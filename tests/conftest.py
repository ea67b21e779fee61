"""Tiny policies in float64, and the exact law of their responses: every response, written down with its probability.

The oracle uses nothing of the package: plain forward passes of the model, one sequence to a row, no padding, no cache,
and Shannon's formula on the responses, which knows neither tokens nor a Rao-Blackwell term.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from entropy_core.numerics import ragged
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences

pytest_plugins = [
    "proofs",
    "attacks",
    "checkpoint_fixtures",
    "store_fixtures",
    "worker_fixtures",
]  # the first two write pages in docs/
of_few_files = ("bad_input_fixtures", "compared_fixtures", "store_command_fixtures", "swept_fixtures")
pytest.register_assert_rewrite(*of_few_files)

COMMON = {"bos_token_id": None, "pad_token_id": None, "attn_implementation": "eager", "initializer_range": 0.6}
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.manual_seed(0)


LONG = {
    *("test_edits", "test_orchestration", "test_vllm", "test_memory", "test_door", "test_what_runs", "test_pipeline"),
    *("test_trainer_parity", "test_vectors", "test_tried_interventions", "test_sources", "test_user_losses"),
    *("test_store_adoption", "test_cli", "test_workers", "test_device_check", "test_hostile_checkpoints"),
    *("test_update", "test_exotic_prompts", "test_adapters", "test_layouts", "test_architectures", "test_stage_inputs"),
}
"""Files that take longest: a worker that began one of them last would keep the others waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What the libraries have made stays: a garbage collection that goes through all of it takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """What a process has written outlives it without fsync, which takes most of the time of a tiny sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    """A command logs to the terminal of the test that calls it, and of no other."""
    log = logging.getLogger("entropy_probe")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])
    logging.getLogger("entropy_probe.store").setLevel(logging.NOTSET)


def gpt2(vocabulary: int = 4, **changes) -> PreTrainedModel:
    """Float64 from end to end; the last token ends a response; input and output embeddings are tied."""
    torch.manual_seed(14)
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**COMMON | sizes | {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1} | changes)
    return GPT2LMHeadModel(config).double()


def llama(**changes) -> PreTrainedModel:
    """Its norms and rotary embeddings are computed in float32 whatever the dtype, so it is exact to about 1e-6."""
    torch.manual_seed(7)
    config = LlamaConfig(**COMMON | SMALL | {"vocab_size": 4, "eos_token_id": 3} | changes)
    return LlamaForCausalLM(config).double()


class _Float64Norm(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return self.weight * hidden_BLD * torch.rsqrt((hidden_BLD**2).mean(-1, keepdim=True) + self.eps)


class _Float64Rotary(nn.Module):
    """Rotary embeddings whose angles are float64."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, hidden_BLD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def _float64_attention(module, query, key, value, attention_mask, scaling, **_):
    """Eager attention whose softmax is in the dtype of the query."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("float64", _float64_attention)
AttentionMaskInterface.register("float64", eager_mask)


def llama64(**changes) -> PreTrainedModel:
    """`llama` with its norms, rotary embeddings and softmax in float64, as everything else in it is."""
    model = llama(attn_implementation="float64", **changes)
    trunk = model.model
    trunk.norm = _Float64Norm(trunk.norm)
    for layer in trunk.layers:
        layer.input_layernorm = _Float64Norm(layer.input_layernorm)
        layer.post_attention_layernorm = _Float64Norm(layer.post_attention_layernorm)
    trunk.rotary_emb = _Float64Rotary(model.config.head_dim, model.config.rope_parameters["rope_theta"])
    return model


def gemma2(**changes) -> PreTrainedModel:
    """Bends its logits with a tanh, after the output embedding."""
    torch.manual_seed(3)
    bent = {"head_dim": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 4}
    config = Gemma2Config(**COMMON | SMALL | bent | {"vocab_size": 4, "eos_token_id": 3} | changes)
    return Gemma2ForCausalLM(config).double()


def policy_of(model: PreTrainedModel, **options) -> Policy:
    """A policy whose tokenizer is never asked for anything."""
    return Policy(model, SimpleNamespace(eos_token_id=None), **options)


def random_direction(policy: Policy, seed: int = 5) -> dict[str, Tensor]:
    """A direction of length 1 in all parameters."""
    generator = torch.Generator().manual_seed(seed)
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.named_parameters().items()}
    norm = torch.cat([t.flatten() for t in v.values()]).norm()
    return {name: t / norm for name, t in v.items()}


def flat(pairs: list[tuple[list[int], list[int]]], prompt_ids: list[int] | None = None) -> BatchedSequences:
    """(prompt, response) pairs in the package's layout."""
    prompts, responses = ([torch.tensor(tokens) for tokens in column] for column in zip(*pairs, strict=True))
    ids_N = torch.arange(len(pairs))
    return BatchedSequences(
        sequence_ids_N=ids_N,
        prompt_ids_N=ids_N if prompt_ids is None else torch.tensor(prompt_ids),
        draws_N=torch.zeros_like(ids_N),
        prompt_tokens=torch.cat(prompts),
        prompt_offsets_N1=ragged.offsets_from_lengths(torch.tensor([len(p) for p in prompts])),
        response_tokens_K=torch.cat(responses),
        response_offsets_N1=ragged.offsets_from_lengths(torch.tensor([len(r) for r in responses])),
        finish_reasons=("length",) * len(pairs),
    )


class Exact(NamedTuple):
    """Of the whole pool, differentiable in the parameters: H_seq in nats, and the mean length L."""

    H_seq: Tensor
    L: Tensor

    @property
    def H_tok(self) -> Tensor:
        """Entropy per token."""
        return self.H_seq / self.L


class World(NamedTuple):
    """A policy, a pool of prompts, and where responses are cut."""

    policy: Policy
    prompts: list[list[int]]
    temperature: float
    max_new_tokens: int

    def responses(self, prompt: list[int]) -> tuple[list[list[int]], Tensor]:
        """Every response to a prompt, and its log-probability."""
        model, eos = self.policy.model, self.policy.eos_token_ids[0]
        prefixes, logps = torch.tensor([prompt]), torch.zeros(1, dtype=torch.float64)
        found: list[list[int]] = []
        found_logps = []
        for step in range(1, self.max_new_tokens + 1):
            logits = model(input_ids=prefixes).logits[:, -1]
            V = logits.shape[1]
            logps = (logps[:, None] + torch.log_softmax(logits / self.temperature, dim=-1)).flatten()
            prefixes = torch.cat([prefixes.repeat_interleave(V, 0), torch.arange(V).repeat(len(prefixes))[:, None]], 1)
            ended = (prefixes[:, -1] == eos) | (step == self.max_new_tokens)
            found += prefixes[ended, len(prompt) :].tolist()
            found_logps.append(logps[ended])
            prefixes, logps = prefixes[~ended], logps[~ended]
        return found, torch.cat(found_logps)

    def exact(self) -> Exact:
        """H_seq = −Σ π(t) log π(t) and L = Σ π(t)·T, averaged over the prompts."""
        entropy, length = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for prompt in self.prompts:
            responses, logp = self.responses(prompt)
            entropy = entropy - (logp.exp() * logp).sum()
            length = length + (logp.exp() * torch.tensor([float(len(r)) for r in responses])).sum()
        return Exact(entropy / len(self.prompts), length / len(self.prompts))

    def everything(self) -> tuple[BatchedSequences, Tensor]:
        """Every (prompt, response), and its probability under D(p)·π(t|p)."""
        pairs, prompt_ids, probabilities = [], [], []
        with torch.no_grad():
            for i, prompt in enumerate(self.prompts):
                responses, logp = self.responses(prompt)
                pairs += [(prompt, response) for response in responses]
                prompt_ids += [i] * len(responses)
                probabilities.append(logp.exp() / len(self.prompts))
        return flat(pairs, prompt_ids), torch.cat(probabilities)

    def derivative(self, of: Callable[[Exact], Tensor], v: dict[str, Tensor]) -> float:
        """⟨∇, v⟩ of a function of the exact values, by reverse mode through the enumeration."""
        parameters = self.policy.named_parameters()
        gradients = torch.autograd.grad(of(self.exact()), [parameters[name] for name in v])
        return sum(float((g * t).sum()) for g, t in zip(gradients, v.values(), strict=True))

    def exact_at(self, v: dict[str, Tensor], eta: float) -> Exact:
        """The exact values at θ + ηv."""
        parameters = self.policy.named_parameters()
        saved = {name: parameters[name].detach().clone() for name in v}
        with torch.no_grad():
            for name, t in v.items():
                parameters[name].add_(t, alpha=eta)
            values = self.exact()
            for name, t in saved.items():
                parameters[name].copy_(t)
        return values


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Three prompts of different length, one of them with an EOS in it; 363 sequences in all; τ is not 1."""
    yield World(policy_of(gpt2(), head_chunk_rows=7), [[1], [2, 0], [3, 1, 0, 2]], temperature=0.7, max_new_tokens=4)


@pytest.fixture(scope="session")
def v(world: World) -> dict[str, Tensor]:
    """A direction for the policy of `world`."""
    return random_direction(world.policy)
