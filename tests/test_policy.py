"""Values, gradients and forward-mode derivatives of real architectures, against the model's own logits."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import gemma2, gpt2, llama, policy_of, random_direction
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients, Policy
from entropy_core.policy.pretrained import load_policy, resolve_device
from entropy_core.policy.scorer import TeacherForcedRows

TAU = 0.7
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], float]] = {  # and what their float32 parts leave of the digits
    "gpt2": (gpt2, 1e-9),
    "gpt2-untied": (lambda: gpt2(tie_word_embeddings=False), 1e-9),
    "llama": (llama, 1e-4),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), 1e-4),
    "gemma2-softcap": (gemma2, 1e-4),
    "gemma2-untied": (lambda: gemma2(tie_word_embeddings=False), 1e-4),
}
zoo = pytest.mark.parametrize("name", MODELS)


def rows() -> TeacherForcedRows:
    """Sequences of length 6, 3 and 2, padded with a token that is also a real one."""
    input_ids_BL = torch.tensor([[1, 0, 2, 2, 1, 3], [0, 2, 3, 0, 0, 0], [2, 1, 0, 0, 0, 0]])
    row_K = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    position_K = torch.tensor([1, 2, 3, 4, 0, 1, 0])
    return TeacherForcedRows(input_ids_BL, row_K, position_K, input_ids_BL[row_K, position_K + 1])


def plain(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """ℓ and h of `rows`, one sequence at a time, from the model's own logits."""
    logprobs, entropies = [], []
    for ids, first in (([1, 0, 2, 2, 1, 3], 2), ([0, 2, 3], 1), ([2, 1], 1)):
        p_LV = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0] / TAU, dim=-1)
        for position in range(first, len(ids)):
            p_V = p_LV[position - 1]
            logprobs.append(p_V[ids[position]].log())
            entropies.append(-(p_V * p_V.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def five_point(policy: Policy, v: dict[str, Tensor], step: float = 0.01) -> tuple[Tensor, ...]:
    """Derivatives of `plain` along v by central differences of fourth order."""
    values = {}
    with torch.no_grad():
        for k in (-2, -1, 1, 2):
            with moves.moved(policy, v, k * step):
                values[k] = torch.stack(plain(policy.model))
    return tuple((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step))


# --- values ----------------------------------------------------------------------------------------------------------


@zoo
@pytest.mark.parametrize("head_chunk_rows", [1, 3, 4096])
def test_statistics_are_those_of_the_models_own_logits(name: str, head_chunk_rows: int):
    make, tolerance = MODELS[name]
    policy = policy_of(make(), head_chunk_rows=head_chunk_rows)
    with torch.no_grad():
        expected = plain(policy.model)
    found = policy.statistics(rows(), TAU)
    torch.testing.assert_close(tuple(found), expected, rtol=tolerance / 10, atol=tolerance / 10)
    assert not any(column_K.requires_grad for column_K in found)


def test_the_head_is_used_apart_only_where_it_gives_the_logits(caplog: pytest.LogCaptureFixture):
    def bent(c: float) -> PreTrainedModel:
        """A llama whose logits something bends that its config does not name."""
        model = llama()
        model.register_forward_hook(lambda module, inputs, output: output | {"logits": c * (output.logits / c).tanh()})
        return model

    with caplog.at_level(logging.WARNING):
        assert all(policy_of(model).scorer.head_is_known for model in (gpt2(), llama(), gemma2()))
        assert policy_of(gemma2(final_logit_softcapping=None)).scorer.head_is_known
        assert not caplog.records
        assert not policy_of(bent(2.0)).scorer.head_is_known
    assert "using full logits" in caplog.text
    assert not policy_of(bent(30.0)).scorer.head_is_known  # which small logits hardly feel


@zoo
def test_decoding_with_a_cache_and_padding_on_the_left_gives_the_same_logits(name: str):
    policy = policy_of(MODELS[name][0]().float())
    prompts, later = [[1], [2, 0, 3, 1], [0, 0]], [[2, 0], [1, 1], [3, 2]]
    ids = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        logits, cache = policy.next_logits(ids, mask, None)
        for step in range(3):
            seen = [p + tokens[:step] for p, tokens in zip(prompts, later, strict=True)]
            expected = torch.stack([policy.model(input_ids=torch.tensor([s])).logits[0, -1] for s in seen])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            if step < 2:
                mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
                logits, cache = policy.next_logits(torch.tensor([[t[step]] for t in later]), mask, cache)


# --- derivatives -----------------------------------------------------------------------------------------------------


@zoo
@pytest.mark.parametrize("head_chunk_rows", [2, 4096])
def test_forward_mode_is_the_limit_of_differences(name: str, head_chunk_rows: int):
    make, tolerance = MODELS[name]
    policy = policy_of(make(), head_chunk_rows=head_chunk_rows)
    v = random_direction(policy)
    found = token_derivatives(policy, rows(), v, TAU)
    assert torch.allclose(torch.stack(found[:2]), torch.stack(policy.statistics(rows(), TAU)), atol=tolerance / 10)
    torch.testing.assert_close(tuple(found[2:]), five_point(policy, v), rtol=10 * tolerance, atol=10 * tolerance)
    assert min(column_K.abs().max() for column_K in found[2:]) > 0.01


@zoo
def test_gradients_are_those_of_plain_autograd(name: str):
    make, tolerance = MODELS[name]
    policy = policy_of(make(), head_chunk_rows=3)
    weights = torch.randn(2, 2, 7, dtype=torch.float64)
    found = [policy.new_accumulator(), policy.new_accumulator()]
    for gradients in found:
        for g in gradients.values():
            g += 1.0  # what is there already stays
    statistics = policy.add_gradients(rows(), [Coefficients(*pair) for pair in weights], TAU, found)
    parameters = policy.named_parameters()
    for gradients, (logprob_K, entropy_K) in zip(found, weights, strict=True):
        logprobs_K, entropies_K = plain(policy.model)
        scalar = (logprob_K * logprobs_K + entropy_K * entropies_K).sum()
        expected = torch.autograd.grad(scalar, list(parameters.values()))
        for (parameter, gradient), g in zip(gradients.items(), expected, strict=True):
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(gradient - 1.0, g, rtol=tolerance, atol=tolerance, msg=parameter)
    assert not any(column_K.requires_grad for column_K in statistics)
    torch.testing.assert_close(tuple(statistics), tuple(policy.statistics(rows(), TAU)))


@zoo
def test_recomputed_activations_give_the_same_gradients(name: str):
    policy = policy_of(MODELS[name][0](), head_chunk_rows=3)
    weights = [Coefficients(*pair) for pair in torch.randn(2, 2, 7, dtype=torch.float64)]
    (layer, *_) = (m for m in policy.model.modules() if isinstance(m, GradientCheckpointingLayer))
    calls, found = [], []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    inner = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__)
    inner.register_forward_hook(lambda *_: calls.append("inner"))
    for policy.recompute_activations in (False, True):
        calls.clear()
        gradients = [policy.new_accumulator(), policy.new_accumulator()]
        statistics = policy.add_gradients(rows(), weights, TAU, gradients)
        found.append((tuple(statistics), gradients))
        assert "forward" not in vars(layer)
        assert calls.count("forward") == 1
        assert (calls.count("inner") > 1) == policy.recompute_activations
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "gemma2-softcap"])
def test_backward_and_forward_mode_agree_in_every_parameter(name: str):
    policy = policy_of(MODELS[name][0](), head_chunk_rows=3)
    weights = Coefficients(*torch.randn(2, 7, dtype=torch.float64))
    gradients = policy.new_accumulator()
    policy.add_gradients(rows(), [weights], TAU, [gradients])
    v = random_direction(policy)
    for part in v:  # along one parameter at a time: no part of the model may be left out
        along = token_derivatives(policy, rows(), {part: v[part]}, TAU)
        forward = (weights.logprob_K @ along.dlogprobs_K + weights.entropy_K @ along.dentropies_K).item()
        backward = float((gradients[part] * v[part]).sum())
        assert forward == pytest.approx(backward, rel=1e-5, abs=1e-6), part


def test_a_parameter_that_is_not_named_is_not_differentiated():
    policy = policy_of(gpt2())
    v = random_direction(policy)
    part = {name: t for name, t in v.items() if ".h.0." in name}
    padded = {name: t if name in part else torch.zeros_like(t) for name, t in v.items()}
    few, all_named = token_derivatives(policy, rows(), part, TAU), token_derivatives(policy, rows(), padded, TAU)
    torch.testing.assert_close(tuple(few), tuple(all_named), rtol=1e-12, atol=1e-14)
    weights = Coefficients(*torch.randn(2, 7, dtype=torch.float64))
    accumulators = policy.new_accumulator(), {n: g for n, g in policy.new_accumulator().items() if n in part}
    for accumulator in accumulators:
        policy.add_gradients(rows(), [weights], TAU, [accumulator])
    for name in part:
        torch.testing.assert_close(accumulators[1][name], accumulators[0][name], rtol=1e-12, atol=1e-14)


def test_a_tied_parameter_appears_once_and_counts_twice():
    tied, untied = policy_of(gpt2()), policy_of(gpt2(tie_word_embeddings=False))
    weight = "transformer.wte.weight"
    assert "lm_head.weight" not in tied.named_parameters() and "lm_head.weight" in untied.named_parameters()
    state = {name: p.detach() for name, p in tied.named_parameters().items()}
    untied.model.load_state_dict(state | {"lm_head.weight": state[weight]})
    v = random_direction(tied)
    found = token_derivatives(tied, rows(), v, TAU)
    expected = token_derivatives(untied, rows(), v | {"lm_head.weight": v[weight]}, TAU)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-12, atol=1e-14)


# --- moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moved_adds_in_float64_and_restores_bit_for_bit(dtype: torch.dtype):
    policy = policy_of(gpt2().to(dtype))
    before = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    direction = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in before.items() if "ln_1" not in name}
    with moves.moved(policy, direction, 1e-3):
        for name, p in policy.named_parameters().items():
            expected = before[name].double() + 1e-3 * direction[name] if name in direction else before[name]
            assert torch.equal(p.detach(), expected.to(dtype)) and p.requires_grad
    assert all(torch.equal(p.detach(), before[name]) for name, p in policy.named_parameters().items())
    with pytest.raises(RuntimeError, match="inside"), moves.moved(policy, direction, 1e9):
        raise RuntimeError("inside")
    assert all(torch.equal(p.detach(), before[name]) for name, p in policy.named_parameters().items())
    with moves.moved(policy, direction, 0.0):
        assert all(torch.equal(p.detach(), before[name]) for name, p in policy.named_parameters().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jitter_goes_to_the_next_number_and_back(dtype: torch.dtype):
    policy = policy_of(gpt2().to(dtype))
    before = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    seen = []
    for seed in (0, 1, 0):
        with moves.jittered(policy, seed):
            seen.append({name: p.detach().clone() for name, p in policy.named_parameters().items()})
        assert all(torch.equal(p.detach(), before[name]) for name, p in policy.named_parameters().items())
    everything = [torch.cat([t.flatten() for t in named.values()]) for named in (before, *seen)]
    theta, first, second, again = everything
    assert torch.equal(first, again) and not torch.equal(first, second)
    step = first.double() - theta.double()
    infinity = torch.full_like(theta, torch.inf)
    up, down = theta.nextafter(infinity), theta.nextafter(-infinity)
    assert torch.equal(first, torch.where(step > 0, up, down))
    assert abs(float((step > 0).double().mean()) - 0.5) < 4 * 0.5 / len(theta) ** 0.5


# --- small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_generation", "of_tokenizer", "expected"),
    [(3, 1, (1, 3)), ([3, 1], 2, (1, 2, 3)), (None, 2, (2,)), (None, None, ()), (0, 0, (0,)), ([3], None, (3,))],
)
def test_tokens_that_end_a_response(of_generation, of_tokenizer, expected: tuple[int, ...]):
    policy = Policy(gpt2(), SimpleNamespace(eos_token_id=of_tokenizer))
    policy.model.generation_config.eos_token_id = of_generation
    assert policy.eos_token_ids == expected


def test_dropout_is_off():
    policy = policy_of(gpt2(resid_pdrop=0.9, attn_pdrop=0.9, embd_pdrop=0.9).train())
    first, second = (torch.stack(policy.statistics(rows(), TAU)) for _ in range(2))
    assert torch.equal(first, second)
    found = token_derivatives(policy, rows(), random_direction(policy), TAU)
    torch.testing.assert_close(torch.stack(found[:2]), first, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path):
    model = gpt2().float()
    model.save_pretrained(tmp_path)
    vocabulary = {"a": 0, "b": 1, "c": 2, "</s>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    for dtype in ("float32", "float64"):
        policy = load_policy(tmp_path, "digest", dtype, "eager", "cpu")
        assert policy is load_policy(tmp_path, "digest", dtype, "eager", "cpu")
        saved = dict(model.named_parameters())
        for name, p in policy.named_parameters().items():
            assert p.dtype == getattr(torch, dtype)
            assert torch.equal(p.detach(), saved[name].detach().to(p.dtype))
        assert policy.eos_token_ids == (3,)
    load_policy.cache_clear()
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_directory_without_a_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}/config.json is not readable"):
        load_policy(tmp_path, "digest", "float32", "eager", "cpu")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer", "its forward"])
def test_a_compiled_model_is_refused(how):
    """Its forward-mode derivatives would be those of torch's own, or none, without a word."""
    model = llama()
    if how == "wrapped":
        model = torch.compile(model)
    elif how == "in place":
        model.compile()
    elif how == "a layer":
        model.model.layers[1].compile()
    else:
        model.forward = torch.compile(model.forward)
    with pytest.raises(CheckpointError, match=r"is compiled, and .* Fix: pass the uncompiled model"):
        policy_of(model)
