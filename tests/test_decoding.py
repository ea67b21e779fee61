"""Rows that are refilled, columns that are dropped, strings that end a response: none of it touches the sequences."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import World, gemma2, gpt2, llama, policy_of
from torch import Tensor

from entropy_core.numerics.philox import Purpose
from entropy_core.policy.model import Policy
from entropy_core.sequences import decoding
from entropy_core.sequences.decoding import Decoding, DecodingRequest, Response

POOL = [[1], [2, 0], [3, 1, 0, 2], [0, 0, 0], [2], [1, 3, 3]]
EOS, LONGEST, TAU, N = 3, 12, 0.9, 60


def decode(policy: Policy, rows: int, **changes) -> list[Response]:
    prompts = [POOL[i % len(POOL)] for i in range(N)]
    law = {"seed": 21, "purpose": Purpose.E_TOKEN, "temperature": TAU, "max_new_tokens": LONGEST} | changes
    return Decoding(policy, DecodingRequest(prompts, torch.arange(N), **law), rows, lambda *_: None).run()


def calls(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> list[tuple[int, int]]:
    """(rows, columns) of every pass through the model from now on; columns that are new count as such."""
    seen, plain = [], policy.next_logits

    def recorded(ids_BL: Tensor, mask_BL: Tensor, cache):
        seen.append((len(ids_BL), mask_BL.shape[1] if ids_BL.shape[1] == 1 else 0))
        return plain(ids_BL, mask_BL, cache)

    monkeypatch.setattr(policy, "next_logits", recorded)
    return seen


@pytest.fixture
def policy(world: World) -> Policy:
    return Policy(copy.deepcopy(world.policy.model), SimpleNamespace(eos_token_id=EOS))


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 200])
@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_refilled_rows_are_like_rows_of_their_own(make, rows: int):
    policy = policy_of(make().double())
    assert decode(policy, rows) == decode(policy, 3)


def test_a_place_is_given_away_when_a_response_ends(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    seen, rows = calls(monkeypatch, policy), 6
    policy.model.float()  # in float64 prompts of different lengths are not prefilled together
    lengths = [len(response.tokens) for response in decode(policy, rows)]
    assert len(set(lengths)) > 5
    steps = sum(columns > 0 for _, columns in seen)
    waiting = sum(max(lengths[i : i + rows]) for i in range(0, N, rows))  # batches that wait for their longest
    assert sum(lengths) / rows <= steps + N / rows < 0.8 * waiting


def test_columns_that_no_row_needs_are_dropped(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    seen = calls(monkeypatch, policy)
    decode(policy, 2)
    steps = sum(columns > 0 for _, columns in seen)
    bound = max(map(len, POOL)) + LONGEST + decoding.STALE_COLUMNS
    assert max(columns for _, columns in seen) <= bound < steps


def test_rows_are_dropped_when_nothing_waits(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    seen = calls(monkeypatch, policy)
    decode(policy, 16)
    assert seen[-1][0] < 16


def test_the_cache_is_held_within_memory(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    usual = decode(policy, 16)
    seen = calls(monkeypatch, policy)
    monkeypatch.setattr(decoding, "_free_bytes", lambda device: 100_000)
    assert decode(policy, 16) == usual
    assert 1 <= max(rows for rows, _ in seen) < 16
    monkeypatch.setattr(decoding, "_free_bytes", lambda device: 0)
    seen.clear()
    assert decode(policy, 16) == usual and {rows for rows, _ in seen} == {1}


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(policy: Policy):
    policy.tokenizer.decode = lambda ids: "".join("ab€."[i] for i in ids)
    free = decode(policy, 5, max_new_tokens=5)
    stopped = decode(policy, 5, max_new_tokens=5, stop_strings=("a€", "bbb"))
    ends = {"eos": 0, "stop": 0, "length": 0}
    for whole, response in zip(free, stopped, strict=True):
        text = policy.tokenizer.decode(whole.tokens)
        found = [text.find(string) + len(string) for string in ("a€", "bbb") if string in text]
        if found:
            assert response == Response(whole.tokens[: min(found)], "stop", [])
        else:
            assert response == whole
        ends[response.finish_reason] += 1
    assert min(ends.values()) > 0, ends
