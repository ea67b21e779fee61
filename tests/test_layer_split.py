"""A policy whose layers are divided among devices computes what one on a single device does, bit for bit.

On the CPU as both devices the hidden states and their tangents are handed over as between two.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import flat, gemma2, gpt2, llama, policy_of, random_direction
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError
from entropy_core.policy import layer_split
from entropy_core.policy.layer_split import devices_for, split_layers
from entropy_core.policy.model import Coefficients, Policy
from entropy_core.policy.moves import moved
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

CPU = torch.device("cpu")
BATCH = flat([([1, 2], [0, 1, 3]), ([2], [2, 2, 1, 0]), ([0, 1, 1], [3])])


def processor(policy: Policy) -> SequenceProcessor:
    return SequenceProcessor(policy, GenerationConfig(0.9, 6, 4, 2))


def gradient(policy: Policy) -> list[Tensor]:
    into = [policy.new_accumulator() for _ in range(2)]
    for index_K, rows in processor(policy).micro_batches(BATCH):
        ones_K = torch.ones(len(index_K), dtype=torch.float64)
        policy.add_gradients(rows, [Coefficients(ones_K, 0 * ones_K), Coefficients(0 * ones_K, ones_K)], 0.9, into)
    return [total for accumulator in into for total in accumulator.values()]


def recomputed_gradient(policy: Policy) -> list[Tensor]:
    policy.recompute_activations = True
    return gradient(policy)


def forward(policy: Policy) -> list[Tensor]:
    return list(forward_mode(processor(policy), BATCH, random_direction(policy))[0])


def at_a_step(policy: Policy) -> list[Tensor]:
    with moved(policy, random_direction(policy), 0.1):
        scores = processor(policy).score(BATCH)[0]
    return [scores.logprobs_K, scores.entropies_K]


def sampled(policy: Policy) -> list[Tensor]:
    return [processor(policy).generate_with_replacement_sampling([[1, 2], [2], [0, 1, 1]], 24, 3).response_tokens_K]


def dropped(policy: Policy) -> list[Tensor]:
    with policy.dropout(seed=3):
        return gradient(policy)


PASSES = [gradient, recomputed_gradient, forward, at_a_step, sampled, dropped]


@pytest.mark.parametrize("make", [gpt2, llama, gemma2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("of", PASSES, ids=lambda of: of.__name__)
def test_every_pass_is_that_of_one_device(make: Callable[..., PreTrainedModel], of: Callable[[Policy], Any]):
    model = make()
    divided = copy.deepcopy(model)
    split_layers(divided, [CPU, CPU])
    expected, found = of(policy_of(model)), of(policy_of(divided))
    assert len(found) == len(expected) and any(one.abs().max() > 0 for one in found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_hidden_states_and_tangents_are_copied_between_two_layers_of_different_places(monkeypatch):
    """And come back; what all layers share is not brought again where it is there."""
    copies = []
    real = layer_split._copied

    def copied(device: torch.device, value: Tensor) -> Tensor:
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
        copies.append(tangent is not None)
        return real(device, value)

    monkeypatch.setattr(layer_split, "_copied", copied)
    model = llama(num_hidden_layers=4)
    split_layers(model, [CPU, CPU, CPU])
    policy = policy_of(model)
    del copies[:]
    policy.forward_mode_attention = "eager"
    forward(policy)
    passes = len(list(processor(policy).micro_batches(BATCH)))
    assert copies == [True] * passes * 3  # two hand-overs, and the way back


def test_the_bytes_are_divided_evenly_and_what_is_no_layer_is_on_the_first_device():
    def places(model: PreTrainedModel, count: int) -> list[int]:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        return layer_split._places(model, layers, count)

    assert places(llama(num_hidden_layers=6, vocab_size=4), 3) == [0, 0, 1, 1, 2, 2]
    assert places(llama(num_hidden_layers=4, vocab_size=60), 2) == [0, 1, 1, 1]  # half of the bytes are embeddings
    assert devices_for(torch.device("cuda"), 2) == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_layers_that_share_parameters_are_refused():
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(CheckpointError, match=r"cannot be divided among 2 devices.*devices_per_policy: 1"):
        split_layers(model, [CPU, CPU])
