"""Draws: the published generator, a function of its arguments alone, and an exact inverse of the softmax's CDF."""

import pytest
import torch
from scipy import stats

from entropy_core.numerics import philox
from entropy_core.numerics.philox import (
    Purpose,
    draw_with_replacement,
    inverse_cdf_tokens,
    permutation,
    philox4x32,
    uniforms,
)

E = Purpose.E_TOKEN
INFINITE = float("inf")


# philox4x32-10 in kat_vectors of Random123 1.14 (Salmon, Moraes, Dror, Shaw)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str):
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == expected.split()


def test_a_draw_does_not_depend_on_what_is_drawn_with_it():
    sequence_N, position_N = torch.arange(500) * 7, torch.arange(500) % 13
    together = uniforms(3, E, sequence_N, position_N)
    shuffled_N = torch.randperm(500)
    assert torch.equal(uniforms(3, E, sequence_N[shuffled_N], position_N[shuffled_N]), together[shuffled_N])
    alone = [uniforms(3, E, s, int(p)) for s, p in zip(sequence_N[:9], position_N[:9], strict=True)]
    assert torch.equal(torch.stack(alone), together[:9])
    assert torch.equal(uniforms(3, E, sequence_N.view(50, 10), position_N.view(50, 10)), together.view(50, 10))


def test_every_argument_matters_with_all_of_its_bits():
    sequences = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**40])
    positions = torch.tensor([[0], [1], [2**31], [2**32 - 1]])
    draws = [
        uniforms(seed, purpose, sequences, positions).flatten()
        for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
        for purpose in Purpose
    ]
    everything = torch.cat(draws)
    assert len(everything.unique()) == len(everything) == len(Purpose) * 5 * 24


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int):
    with pytest.raises(ValueError, match="seed must be in"):
        uniforms(seed, E, torch.arange(3))


@pytest.mark.parametrize(("word", "side"), [(0, "above 0"), (2**32 - 1, "below 1")])
def test_no_draw_is_zero_or_one(monkeypatch: pytest.MonkeyPatch, word: int, side: str):
    monkeypatch.setattr(philox, "philox4x32", lambda counter, key: (torch.tensor([word]),) * 4)
    (u,) = uniforms(0, E, torch.tensor([0])).tolist()
    assert 0 < u < 1, f"not {side}"
    assert min(u, 1 - u) < 1e-15


def test_draws_are_uniform_and_neighbours_independent():
    n = 200_000
    u_N = uniforms(11, E, torch.arange(n))
    assert u_N.dtype == torch.float64
    assert u_N.min() > 0 and u_N.max() < 1
    counts = torch.bincount((u_N * 100).long(), minlength=100)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    neighbours = {
        "sequence": uniforms(11, E, torch.arange(n) + 1),
        "position": uniforms(11, E, torch.arange(n), 1),
        "purpose": uniforms(11, Purpose.U_TOKEN, torch.arange(n)),
        "seed": uniforms(12, E, torch.arange(n)),
    }
    for name, other_N in neighbours.items():
        # the product of two independent centred uniforms has mean 0 and standard deviation 1/12
        assert abs(float(((u_N - 0.5) * (other_N - 0.5)).mean())) < 4 / 12 / n**0.5, name


def test_the_low_bits_are_uniform_too():
    mantissa_N = (uniforms(5, E, torch.arange(100_000)) * 2.0**53).long()
    for bit in range(1, 53):  # bit 0 is the half step's
        share = ((mantissa_N >> bit) & 1).double().mean()
        assert abs(float(share) - 0.5) < 4 * 0.5 / 100_000**0.5, bit


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_evenly_and_a_longer_batch_begins_with_the_shorter():
    drawn_N = draw_with_replacement(42, Purpose.E_PROMPT, torch.arange(70_000), 7)
    assert stats.chisquare(torch.bincount(drawn_N, minlength=7).numpy()).pvalue > 1e-4
    assert torch.equal(draw_with_replacement(42, Purpose.E_PROMPT, torch.arange(4000), 7), drawn_N[:4000])
    assert torch.equal(draw_with_replacement(42, Purpose.E_PROMPT, torch.arange(5), 1), torch.zeros(5).long())


def test_prompts_and_tokens_of_a_sequence_are_independent():
    n = 100_000
    prompt_N = uniforms(42, Purpose.E_PROMPT, torch.arange(n)) - 0.5
    token_N = uniforms(42, Purpose.E_TOKEN, torch.arange(n)) - 0.5
    assert abs(float((prompt_N * token_N).mean())) < 4 / 12 / n**0.5


@pytest.mark.parametrize("pool_size", [1, 2, 1000])
def test_a_permutation_is_one(pool_size: int):
    order_M = permutation(42, Purpose.U_PROMPT, pool_size)
    assert torch.equal(order_M.sort().values, torch.arange(pool_size))


def test_permutations_are_evenly_spread():
    places = torch.stack([permutation(seed, Purpose.E_PROMPT, 4) for seed in range(1200)])
    codes = (places * torch.tensor([64, 16, 4, 1])).sum(1)
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


# --- tokens ----------------------------------------------------------------------------------------------------------


def drawn_shares(logits: list[float], temperature: float, n: int = 100_000) -> torch.Tensor:
    """Share of each token on an even grid of n uniforms: exact to one grid point."""
    grid_B = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens_B = inverse_cdf_tokens(torch.tensor(logits).expand(n, -1), grid_B, temperature)
    return torch.bincount(tokens_B, minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_tokens_have_the_probabilities_of_the_tempered_softmax(temperature: float):
    logits = [0.3, -1.2, 2.0, 0.0, -INFINITE, 1.5]
    weights = torch.tensor([2.718281828459045 ** (z / temperature) for z in logits], dtype=torch.float64)
    shares = drawn_shares(logits, temperature)
    torch.testing.assert_close(shares.double(), weights / weights.sum(), rtol=0, atol=1.01e-5)


@pytest.mark.parametrize("u", [2.0**-54, 0.5, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize("possible", [[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
def test_a_token_of_probability_zero_is_never_drawn(u: float, possible: list[int]):
    logits_BV = torch.tensor([[0.0 if p else -INFINITE for p in possible]])
    token = int(inverse_cdf_tokens(logits_BV, torch.tensor([u], dtype=torch.float64), 1.0))
    assert possible[token]
    where = [i for i, p in enumerate(possible) if p]
    assert token == (where[0] if u < 0.5 else where[-1])


def test_a_token_whose_probability_underflows_is_never_drawn():
    logits_BV = torch.tensor([[-2000.0, 0.0, -2000.0]])
    for u in (2.0**-54, 1.0):
        assert int(inverse_cdf_tokens(logits_BV, torch.tensor([u], dtype=torch.float64), 1.0)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_inverted_in_float64(dtype: torch.dtype):
    logits_V = torch.randn(50_000).to(dtype)
    cdf = logits_V.double().exp().cumsum(0) / logits_V.double().exp().sum()
    u_B = uniforms(1, E, torch.arange(300))
    tokens_B = inverse_cdf_tokens(logits_V.expand(300, -1), u_B, 1.0)
    below_B = torch.where(tokens_B > 0, cdf[tokens_B - 1], 0.0)
    assert (below_B <= u_B + 1e-12).all() and (u_B <= cdf[tokens_B] + 1e-12).all()


def test_rows_do_not_influence_each_other():
    logits_BV, u_B = torch.randn(20, 6), uniforms(9, E, torch.arange(20))
    together_B = inverse_cdf_tokens(logits_BV, u_B, 0.8)
    alone = [inverse_cdf_tokens(logits_BV[i : i + 1], u_B[i : i + 1], 0.8) for i in range(20)]
    assert torch.equal(torch.cat(alone), together_B)
