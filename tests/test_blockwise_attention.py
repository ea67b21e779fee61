"""Attention in blocks: torch's values and derivatives, of every mask and shape, and which policies compute with it."""

from collections.abc import Callable, Iterable

import pytest
import torch
from conftest import gemma2, gpt2, llama, llama64, policy_of, random_direction
from torch import Tensor
from torch.func import jvp
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function, sliding_window_overlay

from entropy_core.numerics import blockwise_attention
from entropy_core.numerics.blockwise_attention import attention
from entropy_core.policy import attention as of_policy
from entropy_core.policy import blockwise
from entropy_core.policy.attention import attention_set
from entropy_core.policy.blockwise import BLOCKWISE, VisibleKeys, forward_mode_attention
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients
from entropy_core.policy.scorer import TeacherForcedRows

B, T = 2, 13


def sliding(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return causal_mask_function(batch, head, query, key) & sliding_window_overlay(4)(batch, head, query, key)


def of_each_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The first sequence is causal; in the second a query sees the three keys before it, too far ones never."""
    return causal_mask_function(batch, head, query, key) & ((batch == 0) | (key > query - 3))


MASKS: dict[str, Callable[..., Tensor]] = {
    "causal": causal_mask_function,
    "sliding": sliding,
    "chunked": chunked_causal_mask_function(5, torch.zeros(B, dtype=torch.long)),
    "of each sequence": of_each_sequence,
}


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """By the definition, with all scores at once."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("block", [1, 5, 100], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_value_and_derivative_are_those_of_the_definition(
    monkeypatch, mask: str, heads: tuple[int, int], softcap: float | None, block: int
):
    H, J = heads
    monkeypatch.setattr(blockwise_attention, "CPU_BYTES", block * B * H * T * 8)
    shapes = (B, H, T, 6), (B, J, T, 6), (B, J, T, 3)
    primal, tangent = (tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes) for _ in range(2))
    where = torch.arange(B)[:, None, None, None], torch.zeros(1, 1, 1, 1), torch.arange(T)[:, None], torch.arange(T)
    seen = MASKS[mask](*where).expand(B, 1, T, T)
    visible = VisibleKeys(MASKS[mask], B, T, T, "cpu")
    expected = jvp(lambda *x: plain(*x, seen, softcap), primal, tangent)
    found = jvp(lambda *x: attention(*x, 0.3, visible, softcap), primal, tangent)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(attention(*primal, 0.3, visible, softcap), expected[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("moving", [0, 1, 2])
def test_an_operand_without_a_tangent_is_constant(moving: int):
    operands = [torch.randn(B, 2, T, 4, dtype=torch.float64) for _ in range(3)]
    visible, seen = VisibleKeys(causal_mask_function, B, T, T, "cpu"), torch.ones(T, T, dtype=torch.bool).tril()

    def along(of: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def alone(x: Tensor) -> Tensor:
            return of(*operands[:moving], x, *operands[moving + 1 :])

        return jvp(alone, (operands[moving],), (torch.ones_like(operands[moving]),))

    found = along(lambda *x: attention(*x, 0.3, visible))
    torch.testing.assert_close(found, along(lambda *x: plain(*x, seen, None)), rtol=0, atol=1e-14)


def test_blocks_that_no_query_sees_are_not_computed():
    visible = VisibleKeys(causal_mask_function, 1, 100, 100, "cpu")
    assert visible(20, 30)[:2] == (0, 30)
    assert VisibleKeys(sliding, 1, 100, 100, "cpu")(20, 30)[:2] == (17, 30)


# --- policies --------------------------------------------------------------------------------------------------------


def rows_of(model: PreTrainedModel, length: int = 12) -> TeacherForcedRows:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    input_ids_BL = torch.randint(0, vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
    row_K, position_K = torch.arange(3).repeat_interleave(6), torch.arange(6).repeat(3) + length - 7
    return TeacherForcedRows(input_ids_BL, row_K, position_K, input_ids_BL[row_K, position_K + 1])


OTHERS = {
    "mistral, sliding": {"model_type": "mistral", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 4},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4},
    "deepseek (MLA)": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 2,
        "kv_lora_rank": 4,
        "q_lora_rank": None,
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 2,
        "v_head_dim": 4,
        "first_k_dense_replace": 2,
    },
}


def other(name: str) -> PreTrainedModel:
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"num_key_value_heads": 1, "vocab_size": 9, "initializer_range": 0.6, "max_position_embeddings": 32}
    config = AutoConfig.for_model(**sizes | common | OTHERS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama64": llama64,
    "gemma2, sliding and with softcaps": gemma2,
    **{name: lambda name=name: other(name) for name in OTHERS},
}


def assert_near(name: str, found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal, relative to the largest number of each tensor; the own attention of most models has a float32 softmax."""
    tolerance = 1e-13 if name in ("gpt2", "llama64") else 3e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [3, 100], ids=lambda rows: f"{rows} rows")
def test_forward_mode_in_blocks_is_that_of_the_models_own_attention(monkeypatch, name: str, rows: int):
    monkeypatch.setattr(blockwise_attention, "CPU_BYTES", rows * 3 * 2 * 12 * 8)
    model = MODELS[name]()
    of_rows = rows_of(model)
    own = policy_of(model, blockwise=False)
    v = random_direction(own)
    expected = token_derivatives(own, of_rows, v, 0.7)
    model.set_attn_implementation(own.own_attention)
    policy = policy_of(model)
    assert forward_mode_attention(policy) == BLOCKWISE
    found = token_derivatives(policy, of_rows, v, 0.7)
    assert_near(name, found, expected)
    assert model.config._attn_implementation == of_policy.plain_attention(model) != BLOCKWISE


@pytest.mark.parametrize("name", MODELS)
def test_plain_passes_are_those_of_the_models_own_attention(name: str):
    model = MODELS[name]()
    own, rows = model.config._attn_implementation, rows_of(model)
    policy = policy_of(model)
    assert model.config._attn_implementation == ("eager" if "gemma2" in name else "sdpa")
    found = policy.statistics(rows, 0.7)
    weights, gradient = Coefficients(*torch.randn(2, len(rows.row_K), dtype=torch.float64)), policy.new_accumulator()
    policy.add_gradients(rows, [weights], 0.7, [gradient])
    with attention_set(model, own):
        expected, exact = policy.statistics(rows, 0.7), policy.new_accumulator()
        policy.add_gradients(rows, [weights], 0.7, [exact])
    assert_near(name, found, expected)
    assert_near(name, gradient.values(), exact.values())


def test_the_attention_is_put_back():
    model = llama()
    with pytest.raises(RuntimeError, match="inside"), attention_set(model, BLOCKWISE):
        assert model.config._attn_implementation == BLOCKWISE
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "eager"


def test_an_attention_of_another_kind_is_the_models_own(monkeypatch, caplog):
    """A bias, a sink, a mask that is a tensor, or anything else that makes other numbers."""
    monkeypatch.setattr(blockwise, "attention", lambda *x: 1.01 * attention(*x))
    policy = policy_of(llama())
    assert forward_mode_attention(policy) == "eager"
    assert "grows with the square of the length" in caplog.text
    rows = rows_of(policy.model)
    assert bool(token_derivatives(policy, rows, random_direction(policy), 1.0).dlogprobs_K.isfinite().all())


def test_sinks_are_not_computed_in_blocks():
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, vocab_size=9, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
    )  # fmt: skip
    policy = policy_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert forward_mode_attention(policy) == "eager"


def test_a_head_of_the_key_for_every_head_of_the_query():
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    q, k, v = torch.randn(1, 4, T, 6), torch.randn(1, 2, T, 6), torch.randn(1, 2, T, 6)
    found, _ = of_policy._ungrouped(module, q, k, v, None, scaling=0.3)
    expected = plain(q, k, v, torch.ones(T, T, dtype=torch.bool).tril(), None).transpose(1, 2)
    torch.testing.assert_close(found, expected)
