"""Generating and scoring: the law that is sampled is the one that is scored, however the work is cut up."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import World, flat, gemma2, gpt2, llama, policy_of, random_direction
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from entropy_core.errors import NonFiniteError, PromptError
from entropy_core.numerics import ragged
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Policy
from entropy_core.sequences import token_sensitivities
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

POOL = [[1], [2, 0], [3, 1, 0, 2], [0, 0, 0], [2], [1, 3, 3]]  # some hold the token that ends a response
EOS, LONGEST, TAU = 3, 4, 0.7


def processor(policy: Policy, **changes: Any) -> SequenceProcessor:
    return SequenceProcessor(policy, GenerationConfig(**{"temperature": TAU, "max_new_tokens": LONGEST} | changes))


def responses(sequences: BatchedSequences) -> list[list[int]]:
    return [sequences.response(i).tolist() for i in range(len(sequences))]


def assert_same(a: BatchedSequences, b: BatchedSequences) -> None:
    for name in BatchedSequences.__annotations__:
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name


def one_at_a_time(model: PreTrainedModel, sequences: BatchedSequences) -> tuple[Tensor, Tensor]:
    """ℓ and h from the model's own logits, without padding, cache or batch."""
    logprobs, entropies = [], []
    with torch.no_grad():
        for i in range(len(sequences)):
            prompt, response = sequences.prompt(i), sequences.response(i)
            logits_LV = model(input_ids=torch.cat([prompt, response])[None]).logits[0] / TAU
            for k, token in enumerate(response.tolist()):
                logp_V = torch.log_softmax(logits_LV[len(prompt) - 1 + k], dim=-1)
                logprobs.append(logp_V[token])
                entropies.append(-(logp_V.exp() * logp_V).sum())
    return torch.stack(logprobs), torch.stack(entropies)


# --- what is sampled -------------------------------------------------------------------------------------------------


def test_sampled_frequencies_are_the_exact_law(world: World):
    n = 6000
    sequences = processor(world.policy).generate_with_replacement_sampling(world.prompts, n, seed=1)
    everything, probability_N = world.everything()
    seen = Counter(zip(sequences.prompt_ids_N.tolist(), map(tuple, responses(sequences)), strict=True))
    pairs = list(zip(everything.prompt_ids_N.tolist(), map(tuple, responses(everything)), strict=True))
    assert seen.keys() <= set(pairs)
    observed = torch.tensor([float(seen[pair]) for pair in pairs])
    often = n * probability_N >= 5  # the rest is one class
    classes = [torch.cat([x[often], x[~often].sum()[None]]).numpy() for x in (observed.double(), n * probability_N)]
    assert len(classes[0]) > 40
    assert stats.chisquare(*classes).pvalue > 1e-4
    scored, _ = processor(world.policy).score(sequences)
    exact = world.exact()
    for found_N, expected in (
        (ragged.sequence_sum(scored.entropies_K, scored.offsets_N1), exact.H_seq.item()),
        (-ragged.sequence_sum(scored.logprobs_K, scored.offsets_N1), exact.H_seq.item()),
        (sequences.lengths_N.double(), exact.L.item()),
    ):
        assert abs(float(found_N.mean()) - expected) < 4 * float(found_N.std()) / n**0.5


def test_a_response_ends_with_its_first_eos_which_is_counted(world: World):
    sequences = processor(world.policy).generate_with_replacement_sampling(POOL, 400, seed=2)
    for response, reason in zip(responses(sequences), sequences.finish_reasons, strict=True):
        assert EOS not in response[:-1]
        assert reason == ("eos" if response[-1] == EOS else "length")
        assert response[-1] == EOS or len(response) == LONGEST
    assert [len(r) for r in responses(sequences)] == sequences.lengths_N.tolist()
    kinds = Counter(zip(sequences.finish_reasons, sequences.lengths_N.tolist(), strict=True))
    # by length, and an EOS at every step: at the very first, and at the last possible one
    assert kinds.keys() == {("length", 4), ("eos", 1), ("eos", 2), ("eos", 3), ("eos", 4)}


def test_the_score_has_mean_zero_at_every_step(world: World, v: dict[str, Tensor]):
    n = 4000
    maker = processor(world.policy)
    sequences = maker.generate_with_replacement_sampling(world.prompts, n, seed=3)
    columns = maker.map_tokens(sequences, lambda rows: token_derivatives(world.policy, rows, v, TAU))
    offsets_N1 = sequences.response_offsets_N1
    total_N = ragged.sequence_sum(columns[2], offsets_N1)
    assert abs(float(total_N.mean())) < 4 * float(total_N.std()) / n**0.5
    for position in range(LONGEST):
        score_K = columns[2][ragged.position_index(offsets_N1) == position]
        assert abs(float(score_K.mean())) < 4 * float(score_K.std()) / len(score_K) ** 0.5
    # without the step that ends a response it would not be: that step is scored
    before_N = total_N - columns[2][offsets_N1[1:] - 1]
    assert abs(float(before_N.mean())) > 10 * float(before_N.std()) / n**0.5


def test_several_tokens_can_end_a_response():
    policy = policy_of(gpt2())
    policy.model.generation_config.eos_token_id = [3, 0]
    sequences = processor(policy).generate_with_replacement_sampling(POOL, 100, seed=2)
    assert {r[-1] for r in responses(sequences) if len(r) < LONGEST} == {0, 3}
    assert not any({0, 3} & set(r[:-1]) for r in responses(sequences))


def test_a_padding_token_that_is_also_the_eos_changes_nothing(world: World):
    other = policy_of(gpt2(pad_token_id=EOS))
    other.model.generation_config.pad_token_id = EOS
    a, b = (processor(p).generate_with_replacement_sampling(POOL, 60, seed=4) for p in (world.policy, other))
    assert_same(a, b)
    scored = [processor(policy).score(of)[0].logprobs_K for policy, of in ((world.policy, a), (other, b))]
    torch.testing.assert_close(*scored, rtol=1e-13, atol=1e-13)  # how a sum is ordered depends on where memory lies


def test_a_generation_config_with_other_wishes_is_not_followed(world: World):
    other = policy_of(gpt2())
    for name, value in {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0}.items():
        setattr(other.model.generation_config, name, value)
    a, b = (processor(p).generate_with_replacement_sampling(POOL, 60, seed=4) for p in (world.policy, other))
    assert_same(a, b)


def test_the_temperature_is_that_of_the_config(world: World):
    cold = processor(world.policy, temperature=1e-3).generate_with_replacement_sampling(POOL, 40, seed=5)
    greedy = {}
    for prompt in POOL:
        ids = list(prompt)
        while len(ids) < len(prompt) + LONGEST and (len(ids) == len(prompt) or ids[-1] != EOS):
            with torch.no_grad():
                ids.append(int(world.policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        greedy[tuple(prompt)] = ids[len(prompt) :]
    for i, response in enumerate(responses(cold)):
        assert response == greedy[tuple(cold.prompt(i).tolist())]


# --- which prompts ---------------------------------------------------------------------------------------------------


def test_prompts_drawn_with_replacement_get_a_response_each(world: World):
    sequences = processor(world.policy).generate_with_replacement_sampling(POOL, 90, seed=6)
    seen: Counter[int] = Counter()
    of_prompt: dict[int, set[tuple[int, ...]]] = {}
    for i, (prompt, draw) in enumerate(zip(sequences.prompt_ids_N.tolist(), sequences.draws_N.tolist(), strict=True)):
        assert sequences.prompt(i).tolist() == POOL[prompt]
        assert draw == seen[prompt]
        seen[prompt] += 1
        of_prompt.setdefault(prompt, set()).add(tuple(sequences.response(i).tolist()))
    assert seen.keys() == set(range(len(POOL)))
    assert sum(len(different) > 2 for different in of_prompt.values()) > 3


@pytest.mark.parametrize("purpose", ["E", "U"])
def test_distinct_prompts_get_g_responses_each(world: World, purpose: Any):
    B, G = 4, 5
    sequences = processor(world.policy).generate_distinct(POOL, B * G, G, 7, purpose)
    assert sequences.draws_N.tolist() == list(range(G)) * B
    by_prompt = sequences.prompt_ids_N.view(B, G)
    assert (by_prompt == by_prompt[:, :1]).all()
    assert len(by_prompt[:, 0].unique()) == B
    assert all(sequences.prompt(i).tolist() == POOL[p] for i, p in enumerate(sequences.prompt_ids_N.tolist()))
    assert any(len({tuple(r) for r in responses(sequences)[b * G : b * G + G]}) > 2 for b in range(B))


def test_e_and_u_are_different_at_one_seed(world: World):
    e, u = (processor(world.policy).generate_distinct(POOL, 30, 5, 7, purpose) for purpose in ("E", "U"))
    assert e.prompt_ids_N.tolist() != u.prompt_ids_N.tolist()
    by_prompt = [
        {p: [r for r, q in zip(responses(s), s.prompt_ids_N.tolist(), strict=True) if p == q] for p in range(6)}
        for s in (e, u)
    ]
    assert all(by_prompt[0][p] != by_prompt[1][p] for p in range(6))


def test_given_prompts_are_answered_in_their_order_and_scored(world: World):
    sequences, scored, diagnostics = processor(world.policy).generate_with_logprobs(POOL[:3], 2, seed=8)
    assert [sequences.prompt(i).tolist() for i in range(6)] == [p for p in POOL[:3] for _ in range(2)]
    torch.testing.assert_close((scored.logprobs_K, scored.entropies_K), one_at_a_time(world.policy.model, sequences))
    for i in range(6):
        mine = scored.logprobs_K[int(scored.offsets_N1[i]) : int(scored.offsets_N1[i + 1])].tolist()
        assert diagnostics.sum_logprobs_N[i].item() == pytest.approx(sum(mine))
        assert diagnostics.max_surprisal_N[i].item() == pytest.approx(-min(mine))
    entropy_N = ragged.sequence_sum(scored.entropies_K, scored.offsets_N1)
    torch.testing.assert_close(diagnostics.sum_entropies_N, entropy_N)


# --- however the work is cut up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gen_batch_size", [1, 3, 512])
def test_sequences_do_not_depend_on_the_decoding_batch(world: World, gen_batch_size: int):
    # left padding is different in each case, up to three tokens and none at all
    expected = processor(world.policy, gen_batch_size=7).generate_with_replacement_sampling(POOL, 50, seed=9)
    found = processor(world.policy, gen_batch_size=gen_batch_size).generate_with_replacement_sampling(POOL, 50, seed=9)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_padding_on_the_left_is_harmless_in_every_architecture_and_dtype(make: Any, dtype: torch.dtype):
    policy = policy_of(make().to(dtype))
    alone, together = (
        processor(policy, gen_batch_size=size).generate_with_replacement_sampling(POOL, 50, seed=9) for size in (1, 50)
    )
    assert_same(alone, together)


def test_a_larger_batch_begins_with_the_smaller(world: World):
    maker = processor(world.policy)
    four, eight = (maker.generate_with_replacement_sampling(POOL, n, seed=10) for n in (4, 8))
    assert responses(eight)[:4] == responses(four)
    assert eight.prompt_ids_N[:4].tolist() == four.prompt_ids_N.tolist()
    assert eight.sequence_ids_N.tolist() == list(range(8))


def test_shards_are_parts_of_the_whole(world: World):
    maker = processor(world.policy)
    modes = [
        lambda count, first: maker.generate_with_replacement_sampling(POOL, count, 11, first),
        lambda count, first: maker.generate_distinct(POOL, count, 4, 11, "U", first),
    ]
    for generate in modes:
        whole, shards = generate(20, 0), [generate(7, 0), generate(10, 7), generate(3, 17)]
        assert [r for shard in shards for r in responses(shard)] == responses(whole)
        for name in ("sequence_ids_N", "prompt_ids_N", "draws_N", "prompt_tokens"):
            assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(whole, name)), name


@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_scores_are_those_of_the_models_own_logits(make: Any):
    policy = policy_of(make())
    close = {"rtol": 1e-10, "atol": 1e-11} if make is gpt2 else {"rtol": 1e-5, "atol": 1e-5}
    sequences = processor(policy, gen_batch_size=1).generate_with_replacement_sampling(POOL, 30, seed=12)
    expected = one_at_a_time(policy.model, sequences)
    for tf_batch_size in (1, 4, 256):
        scored, _ = processor(policy, tf_batch_size=tf_batch_size).score(sequences)
        torch.testing.assert_close((scored.logprobs_K, scored.entropies_K), expected, **close)
        assert torch.equal(scored.offsets_N1, sequences.response_offsets_N1)


def test_scores_and_derivatives_do_not_depend_on_batch_or_order(world: World, v: dict[str, Tensor]):
    pairs = [([1], [0, 2, 3]), ([2, 0], [3]), ([3, 1, 0, 2], [1, 1, 1, 1]), ([0, 0, 0], [2, 3]), ([2], [0, 0, 0, 3])]
    orders = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 3, 0, 2, 4]]
    found = []
    for order, tf_batch_size in zip(orders, (1, 2, 5), strict=True):
        sequences = flat([pairs[i] for i in order])
        columns = processor(world.policy, tf_batch_size=tf_batch_size).map_tokens(
            sequences, lambda rows: token_derivatives(world.policy, rows, v, TAU)
        )
        parts = [torch.stack(columns)[:, a:b] for a, b in zip(*_bounds(sequences), strict=True)]
        found.append(torch.cat([parts[order.index(i)] for i in range(5)], dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-12)


def _bounds(sequences: BatchedSequences) -> tuple[list[int], list[int]]:
    offsets = sequences.response_offsets_N1.tolist()
    return offsets[:-1], offsets[1:]


def test_every_token_is_in_one_micro_batch_and_progress_is_told(world: World):
    told = []
    maker = SequenceProcessor(
        world.policy, GenerationConfig(TAU, LONGEST, gen_batch_size=4, tf_batch_size=3), lambda *done: told.append(done)
    )
    sequences = maker.generate_with_replacement_sampling(POOL, 10, seed=13)
    done = [0, *(count for count, _ in told)]
    assert done[-1] == 10 and all(0 < later - earlier <= 4 for earlier, later in pairwise(done))
    assert {total for _, total in told} == {10}
    told.clear()
    covered, widths = [], []
    for index_K, rows in maker.micro_batches(sequences):
        covered += index_K.tolist()
        widths.append(rows.input_ids_BL.shape[1])
        assert torch.equal(rows.tokens_K, sequences.response_tokens_K[index_K])
    assert sorted(covered) == list(range(len(sequences.response_tokens_K)))
    assert widths == sorted(widths, reverse=True)  # what does not fit in memory shows at once
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]


@pytest.mark.parametrize("tokens", [1, 9, 20, 10_000])
def test_a_micro_batch_of_long_answers_has_fewer_of_them(world: World, tokens: int):
    maker = SequenceProcessor(world.policy, GenerationConfig(TAU, LONGEST, tf_batch_size=6, tf_batch_tokens=tokens))
    sequences = maker.generate_with_replacement_sampling(POOL, 23, seed=13)
    shapes = [tuple(rows.input_ids_BL.shape) for _, rows in maker.micro_batches(sequences)]
    assert sum(rows for rows, _ in shapes) == 23
    for (rows, length), following in pairwise([*shapes, None]):
        assert rows == 1 or (rows <= 6 and rows * length <= tokens)
        assert rows == 6 or (rows + 1) * length > tokens or following is None  # as many as there is room for
    expected, _ = processor(world.policy, tf_batch_size=1).score(sequences)
    scored, _ = maker.score(sequences)
    torch.testing.assert_close(scored.logprobs_K, expected.logprobs_K, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 20])
def test_sensitivities_do_not_depend_on_the_micro_batches(world: World, monkeypatch, tokens: int):
    told: list[tuple[int, int]] = []
    config = GenerationConfig(TAU, LONGEST, tf_batch_size=8)
    maker = SequenceProcessor(world.policy, config, lambda *done: told.append(done))
    sequences = maker.generate_with_replacement_sampling(POOL, 23, seed=13)
    covector = in_blocks({name: v.double() for name, v in random_direction(world.policy).items()})
    whole = token_sensitivities.token_sensitivities(maker, [sequences], covector)
    monkeypatch.setattr(token_sensitivities, "CPU_TOKENS", tokens)
    told.clear()
    cut = token_sensitivities.token_sensitivities(maker, [sequences], covector)
    assert len(told) == 23 if tokens == 1 else len(told) > 3  # three micro-batches without the limit
    for cut_K, whole_K in zip(cut, whole, strict=True):
        assert len(whole_K) == len(sequences.response_tokens_K) and float(whole_K.abs().max()) > 0.01
        torch.testing.assert_close(cut_K, whole_K, rtol=1e-9, atol=1e-10)


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_is_found_where_it_is(dtype: torch.dtype):
    policy = policy_of(gpt2().to(dtype))
    maker = processor(policy, tf_batch_size=1)  # a NaN in the padding of a shorter sequence would count as its own
    sequences = maker.generate_with_replacement_sampling([[1], [2, 0, 1, 1]], 20, seed=14, first=100)
    with torch.no_grad():
        policy.model.transformer.wpe.weight[5] = float("nan")  # position 5 is seen by long sequences only
    late = [i for i in range(20) if len(sequences.prompt(i)) + len(sequences.response(i)) > 5]
    assert 0 < len(late) < 20 and late[0] > 0
    with pytest.raises(NonFiniteError, match=f"the first in sequence {100 + late[0]} at position"):
        maker.score(sequences)


def test_a_policy_of_nans_cannot_be_sampled():
    policy = policy_of(gpt2())
    with torch.no_grad():
        policy.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="sequence"):
        processor(policy).generate_with_replacement_sampling(POOL, 4, seed=15)


def test_tokens_that_the_policy_does_not_know_are_refused():
    maker = processor(policy_of(gpt2()))
    maker.require_vocabulary([[0, 1], [3]])
    with pytest.raises(PromptError, match="prompt 1 contains token id 9, and the policy has only 4 embeddings"):
        maker.require_vocabulary([[0], [2, 9], [3]])


def test_a_policy_without_an_eos_runs_to_the_end():
    policy = Policy(gpt2(eos_token_id=None), SimpleNamespace(eos_token_id=None))
    sequences = processor(policy).generate_with_replacement_sampling(POOL, 10, seed=16)
    assert sequences.lengths_N.tolist() == [LONGEST] * 10
    assert set(sequences.finish_reasons) == {"length"}
