"""A policy whose layers are divided among devices computes what one on a single device does, bit for bit.

On the CPU as both devices the hidden states and their tangents are handed over as between two.
On the CPU and the device of `shadow_device`, which computes as the CPU does, a tensor on the wrong one is refused.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import flat, gemma2, gpt2, llama, policy_of, random_direction
from shadow_device import shadow_device
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError
from entropy_core.policy import layer_split
from entropy_core.policy.derivatives import as_tangent
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
    return list(forward_mode(processor(policy), BATCH, as_tangent(random_direction(policy), policy))[0])


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


@pytest.mark.parametrize("of", PASSES, ids=lambda of: of.__name__)
def test_nothing_is_left_on_the_wrong_device(of: Callable[[Policy], Any]):
    model = llama(num_hidden_layers=3)
    with shadow_device() as device:
        divided = copy.deepcopy(model)
        split_layers(divided, [CPU, device])
        policy = policy_of(divided)
        assert {parameter.device for parameter in divided.parameters()} == {CPU, device}
        found = [one.cpu() for one in of(policy)]
    for one, expected in zip(found, of(policy_of(model)), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bring", "hand_over"])
def test_what_is_not_handed_over_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(layer_split._Shared, name, lambda self, module, args, kwargs: (args, kwargs))
    monkeypatch.setattr(layer_split._Shared, "_there", lambda self, value: value)
    with shadow_device() as device, pytest.raises(RuntimeError, match="same device"):
        model = llama(num_hidden_layers=3)
        split_layers(model, [CPU, device])
        policy_of(model)


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
