"""ℓ, h and their derivatives: against plain formulas, finite differences, forward mode and autograd, in float64."""

import math

import pytest
import torch
from torch import Tensor

from entropy_core.numerics.token_statistics import (
    TokenDerivatives,
    chunked_statistics,
    expected_discriminator,
    token_statistics,
)

TEMPERATURES = [0.3, 1.0, 2.5]
ROWS, VOCABULARY = 6, 5


def by_hand(logits: list[float], token: int, temperature: float) -> tuple[float, float]:
    """(ℓ, h) of one row, from probabilities in Python; a logit of −∞ has probability 0 and adds nothing."""
    weights = [math.exp(z / temperature) for z in logits]
    probabilities = [w / math.fsum(weights) for w in weights]
    return math.log(probabilities[token]), -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def token_derivatives(logits_RV: Tensor, dlogits_RV: Tensor, tokens_R: Tensor, temperature: float) -> TokenDerivatives:
    """ℓ, h, ℓ̇ and ḣ, by forward mode."""
    values, derivatives = torch.func.jvp(
        lambda z_RV: token_statistics(z_RV, tokens_R, temperature), (logits_RV,), (dlogits_RV,)
    )
    return TokenDerivatives(*values, *derivatives)


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a few −∞, their derivative, tokens that are possible."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = 3 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    dlogits_RV = torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    logits_RV[1, 2] = logits_RV[4, 0] = logits_RV[4, 4] = -math.inf
    return logits_RV, dlogits_RV, torch.tensor([0, 1, 2, 3, 1, 4])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_values(temperature: float):
    logits_RV, dlogits_RV, tokens_R = rows()
    expected = torch.tensor(
        [by_hand(z, t, temperature) for z, t in zip(logits_RV.tolist(), tokens_R.tolist(), strict=True)],
        dtype=torch.float64,
    ).T
    logprobs_R, entropies_R = token_statistics(logits_RV, tokens_R, temperature)
    torch.testing.assert_close(torch.stack([logprobs_R, entropies_R]), expected, rtol=1e-13, atol=1e-14)
    forward = token_derivatives(logits_RV, dlogits_RV, tokens_R, temperature)
    assert torch.equal(forward.logprobs_K, logprobs_R) and torch.equal(forward.entropies_K, entropies_R)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_derivatives_are_those_of_finite_differences(temperature: float):
    logits_RV, dlogits_RV, tokens_R = rows()
    step = 1e-5
    above = token_statistics(logits_RV + step * dlogits_RV, tokens_R, temperature)
    below = token_statistics(logits_RV - step * dlogits_RV, tokens_R, temperature)
    found = token_derivatives(logits_RV, dlogits_RV, tokens_R, temperature)
    for derivative_R, a_R, b_R in zip(found[2:], above, below, strict=True):
        torch.testing.assert_close(derivative_R, (a_R - b_R) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_derivatives_are_those_of_forward_mode_through_the_plain_formula(temperature: float):
    logits_RV, dlogits_RV, tokens_R = rows()
    logits_RV = logits_RV.clamp_min(-50)  # the plain formula does not know 0·log 0

    def plain(z_RV: Tensor) -> tuple[Tensor, Tensor]:
        p_RV = torch.softmax(z_RV / temperature, dim=-1)
        return p_RV[torch.arange(ROWS), tokens_R].log(), -(p_RV * p_RV.log()).sum(-1)

    (logprobs_R, entropies_R), (dlogprobs_R, dentropies_R) = torch.func.jvp(plain, (logits_RV,), (dlogits_RV,))
    found = token_derivatives(logits_RV, dlogits_RV, tokens_R, temperature)
    for a_R, b_R in zip(found, (logprobs_R, entropies_R, dlogprobs_R, dentropies_R), strict=True):
        torch.testing.assert_close(a_R, b_R, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_the_derivatives_in_every_direction(temperature: float):
    logits_RV, _, tokens_R = rows()
    weight_R = torch.randn(2, ROWS, dtype=torch.float64)
    leaf_RV = logits_RV.clone().requires_grad_()
    logprobs_R, entropies_R = token_statistics(leaf_RV, tokens_R, temperature)
    (gradient_RV,) = torch.autograd.grad((weight_R[0] * logprobs_R + weight_R[1] * entropies_R).sum(), leaf_RV)
    for column in range(VOCABULARY):
        unit_RV = torch.zeros_like(logits_RV)
        unit_RV[:, column] = 1.0
        along = token_derivatives(logits_RV, unit_RV, tokens_R, temperature)
        expected_R = weight_R[0] * along.dlogprobs_K + weight_R[1] * along.dentropies_K
        torch.testing.assert_close(gradient_RV[:, column], expected_R, rtol=1e-12, atol=1e-13)


def test_a_common_shift_of_the_logits_and_of_their_derivative_changes_nothing():
    logits_RV, dlogits_RV, tokens_R = rows()
    plain = token_derivatives(logits_RV, dlogits_RV, tokens_R, 0.7)
    shifted = token_derivatives(logits_RV + 100.0, dlogits_RV + 1e4, tokens_R, 0.7)
    for a_R, b_R in zip(plain, shifted, strict=True):
        torch.testing.assert_close(a_R, b_R, rtol=1e-9, atol=1e-9)


def test_the_score_has_mean_zero_and_the_uniform_law_the_largest_entropy():
    logits_RV, dlogits_RV, _ = rows()
    p_RV = torch.softmax(logits_RV / 0.7, dim=-1)
    scores_RV = torch.stack(
        [
            token_derivatives(logits_RV, dlogits_RV, torch.full((ROWS,), token), 0.7).dlogprobs_K
            for token in range(VOCABULARY)
        ],
        dim=1,
    )
    torch.testing.assert_close((p_RV * scores_RV).sum(1), torch.zeros(ROWS, dtype=torch.float64), rtol=0, atol=1e-14)
    even = token_derivatives(torch.zeros(ROWS, VOCABULARY).double(), dlogits_RV, torch.zeros(ROWS).long(), 1.0)
    assert torch.allclose(even.entropies_K, torch.tensor(math.log(VOCABULARY)).double())
    assert even.dentropies_K.abs().max() < 1e-15


def test_a_certain_token_is_finite_in_value_and_in_gradient():
    logits_RV = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, -1e4, -1e4]], requires_grad=True)
    logprobs_R, entropies_R = token_statistics(logits_RV, torch.tensor([0, 0]), 1.0)
    assert logprobs_R.tolist() == entropies_R.tolist() == [0.0, 0.0]
    (gradient_RV,) = torch.autograd.grad((logprobs_R + entropies_R).sum(), logits_RV)
    assert torch.isfinite(gradient_RV).all()
    derivatives = token_derivatives(logits_RV.detach(), torch.ones(2, 3), torch.tensor([0, 0]), 1.0)
    assert all(torch.isfinite(column).all() for column in derivatives)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_expected_discriminator_is_a_mean_over_tokens(temperature: float):
    logits_RV, _, _ = rows()
    expected = []
    for z in logits_RV.tolist():
        possible = [token for token in range(VOCABULARY) if z[token] > -math.inf]
        logp, h = zip(*(by_hand(z, token, temperature) for token in possible), strict=True)
        expected.append(math.fsum(math.exp(x) * math.exp(x) * (h[0] + x) for x in logp))
    found_R = expected_discriminator(logits_RV, temperature)
    torch.testing.assert_close(found_R, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_the_expected_discriminator_vanishes_where_all_or_one_is_certain():
    certain_RV = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, -1e4, -1e4], [1.0, 1.0, -math.inf], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(expected_discriminator(certain_RV, 1.0), torch.zeros(4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 100])
def test_chunks_change_nothing(chunk_rows: int, dtype: torch.dtype):
    torch.manual_seed(3)
    head = torch.nn.Linear(3, VOCABULARY).to(dtype)
    hidden_KD, dhidden_KD = torch.randn(2, 17, 3, dtype=dtype)
    tokens_K = torch.randint(0, VOCABULARY, (17,))
    dlogits_KV = dhidden_KD @ head.weight.detach().T
    whole = token_derivatives(head(hidden_KD).detach(), dlogits_KV, tokens_K, 0.7)

    def watched(a: Tensor) -> Tensor:
        assert len(a) <= chunk_rows
        return head(a)

    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    with torch.no_grad():
        values, derivatives = torch.func.jvp(
            lambda a: chunked_statistics(watched, a, tokens_K, 0.7, chunk_rows), (hidden_KD,), (dhidden_KD,)
        )
        torch.testing.assert_close((*values, *derivatives), tuple(whole), **close)
        statistics = chunked_statistics(watched, hidden_KD, tokens_K, 0.7, chunk_rows)
    torch.testing.assert_close(tuple(statistics), tuple(whole[:2]), **close)

    weights_K = torch.randn(2, 17, dtype=dtype)
    leaf_KD = hidden_KD.clone().requires_grad_()
    gradients = []
    for logprobs_K, entropies_K in (
        chunked_statistics(watched, leaf_KD, tokens_K, 0.7, chunk_rows),
        token_statistics(head(leaf_KD), tokens_K, 0.7),
    ):
        scalar = (weights_K[0] * logprobs_K + weights_K[1] * entropies_K).sum()
        gradients.append(torch.autograd.grad(scalar, [leaf_KD, *head.parameters()]))
    torch.testing.assert_close(*gradients, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [7.0, 12.0, 20.0, 30.0])
def test_where_one_token_is_nearly_certain_the_relative_error_is_that_of_rounding(gap: float, dtype: torch.dtype):
    """With 1 + r in place of log1p(r), h and ℓ̇ are off by 1e-7/r in float32: all of it at a gap of 20."""
    generator = torch.Generator().manual_seed(1)
    logits_RV, dlogits_RV = torch.rand(2, ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    likeliest_R = torch.arange(ROWS) % VOCABULARY
    logits_RV[torch.arange(ROWS), likeliest_R] += gap
    logits_RV, dlogits_RV = logits_RV.to(dtype), dlogits_RV.to(dtype)
    leaf_RV = logits_RV.clone().requires_grad_()
    (gradient_RV,) = torch.autograd.grad(token_statistics(leaf_RV, likeliest_R, 1.0).logprobs_K.sum(), leaf_RV)
    found = token_derivatives(logits_RV, dlogits_RV, likeliest_R, 1.0)
    for r, (z, dz) in enumerate(zip(logits_RV.double().tolist(), dlogits_RV.double().tolist(), strict=True)):
        own = int(likeliest_R[r])
        weights = [math.exp(x - z[own]) for x in z]
        others = [a for a in range(VOCABULARY) if a != own]
        rest = math.fsum(weights[a] for a in others)
        logprob, p = -math.log1p(rest), [w / (1 + rest) for w in weights]
        dlogprob = math.fsum(p[a] * (dz[own] - dz[a]) for a in others)
        h = -math.fsum([p[own] * logprob, *(p[a] * (z[a] - z[own] + logprob) for a in others)])
        logp = [x - z[own] + logprob for x in z]
        dh = -math.fsum(p[a] * logp[a] * (dz[a] - dz[own] + dlogprob) for a in range(VOCABULARY))
        expected = torch.tensor([logprob, h, dlogprob, dh], dtype=torch.float64)
        close = {"rtol": 300 * torch.finfo(dtype).eps, "atol": 0.0}
        torch.testing.assert_close(torch.stack([column[r] for column in found]).double(), expected, **close)
        torch.testing.assert_close(
            gradient_RV[r, own].double(), torch.tensor(rest / (1 + rest), dtype=torch.float64), **close
        )
