"""Losses against the formulas of their gradients, against trainers' code, and against added copies of a response."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from entropy_core.numerics import losses, ragged
from entropy_core.numerics.advantages import Loss, group_advantages
from entropy_core.numerics.loss_batch import LossBatch, Objective
from entropy_core.numerics.losses import LOSSES, LossFunction, TokenPair

P, G, LONGEST, N = 3, 4, 6, 12
KL_BETA = 0.3
TOKEN_MEANS = ("dapo", "bnpo", "cispo")
each = pytest.mark.parametrize("name", LOSSES)


def batch_of(name: str = "grpo", kl_beta: float = 0.0, seed: int = 0) -> LossBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(1, LONGEST + 1, (N,), generator=generator)
    rewards_PG = torch.randn(P, G, generator=generator, dtype=torch.float64)
    rewards_PG[0] = 0.25  # a prompt whose rewards are all equal stays in the denominator
    noise_3K = torch.randn(3, int(lengths_N.sum()), generator=generator, dtype=torch.float64)
    return LossBatch.on_policy(
        -noise_3K[0].abs(),
        noise_3K[1].abs(),
        ragged.offsets_from_lengths(lengths_N),
        group_advantages(rewards_PG, name),
        rewards_PG,
        max_new_tokens=LONGEST,
        reference_logprobs_K=-noise_3K[2].abs() if kl_beta else None,
        objective=Objective(kl_beta=kl_beta),
    )


def along(seed: int = 1) -> TokenPair:
    generator = torch.Generator().manual_seed(seed)
    return TokenPair(*torch.randn(2, len(batch_of().logprobs_K), generator=generator, dtype=torch.float64))


def bonus(batch: LossBatch) -> Tensor:
    """GRPO with an entropy bonus."""
    return losses.grpo(batch) - 0.01 * batch.mean(batch.sequence_sum(batch.entropies_K) / batch.lengths_N)


def bonus_over_tokens(batch: LossBatch) -> Tensor:
    """DAPO with an entropy bonus that all tokens share."""
    return losses.dapo(batch) - 0.01 * batch.mean(batch.sequence_sum(batch.entropies_K)) / batch.mean(batch.lengths_N)


def test_every_published_loss_is_there():
    assert tuple(LOSSES) == get_args(Loss)
    for name, loss in LOSSES.items():
        assert loss.__name__ == name and re.search("arXiv:|doi:|TRL", inspect.getdoc(loss))


# --- the gradient ----------------------------------------------------------------------------------------------------


def denominators(name: str, lengths_N: Tensor) -> Tensor:
    """Z_i of −(1/N) Σ_i A_i (1/Z_i) Σ_k ℓ_ik."""
    T_N = lengths_N.double()
    constant = {"dr_grpo": torch.tensor(LONGEST).double()} | dict.fromkeys(TOKEN_MEANS, T_N.mean())
    return {"grpo": T_N}.get(name, constant.get(name, T_N.new_ones(())).expand(len(T_N)))


@each
@pytest.mark.parametrize("kl_beta", [0.0, KL_BETA])
def test_coefficients_by_formula(name: str, kl_beta: float):
    batch = batch_of(name, kl_beta)
    found = losses.coefficients(LOSSES[name], batch)
    lengths_N = ragged.lengths(batch.offsets_N1)
    weight_K = torch.repeat_interleave(1 / (N * denominators(name, lengths_N)), lengths_N)
    expected_K = -torch.repeat_interleave(batch.advantages_N, lengths_N) * weight_K
    if batch.reference_logprobs_K is not None:
        expected_K = expected_K + kl_beta * weight_K * (1 - (batch.reference_logprobs_K - batch.logprobs_K).exp())
    torch.testing.assert_close(found.logprob_K, expected_K, rtol=1e-12, atol=1e-16)
    assert not found.entropy_K.any()
    assert found.logprob_K.abs().max() > 0.01


def padded(values_K: Tensor, batch: LossBatch) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values_K.split(ragged.lengths(batch.offsets_N1).tolist()), batch_first=True)


TRAINERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of per-token terms and their mask, as TRL has them
    "grpo": lambda x_NL, mask_NL: ((x_NL * mask_NL).sum(-1) / mask_NL.sum(-1)).mean(),
    "dapo": lambda x_NL, mask_NL: (x_NL * mask_NL).sum() / mask_NL.sum(),
    "dr_grpo": lambda x_NL, mask_NL: (x_NL * mask_NL).sum() / (len(mask_NL) * LONGEST),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_coefficients_are_the_derivative_of_the_loss_as_trainers_write_it(name: str):
    batch = batch_of(name, KL_BETA)
    logprob_NL, reference_NL = (padded(x_K, batch) for x_K in (batch.logprobs_K, batch.reference_logprobs_K))
    mask_NL = padded(torch.ones_like(batch.logprobs_K), batch)
    logprob_NL = logprob_NL.clone().requires_grad_()
    ratio_NL = (logprob_NL - logprob_NL.detach()).exp()
    advantages_N1 = batch.advantages_N[:, None]
    clipped_NL = ratio_NL.clamp(0.8, 1.2)  # of no effect on-policy
    per_token_NL = -torch.min(ratio_NL * advantages_N1, clipped_NL * advantages_N1)
    log_ratio_NL = reference_NL - logprob_NL
    value = TRAINERS[name](per_token_NL + KL_BETA * (log_ratio_NL.exp() - log_ratio_NL - 1), mask_NL)
    (gradient_NL,) = torch.autograd.grad(value, logprob_NL)
    found = losses.coefficients(LOSSES[name], batch)
    torch.testing.assert_close(padded(found.logprob_K, batch), gradient_NL, rtol=1e-12, atol=1e-16)
    assert LOSSES[name](batch).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_so_are_those_of_whole_responses(name: str):
    batch = batch_of(name)
    logprob_NL = padded(batch.logprobs_K, batch).clone().requires_grad_()
    logprob_N = logprob_NL.sum(-1)
    value = (-(logprob_N - logprob_N.detach()).exp() * batch.advantages_N).mean()
    (gradient_NL,) = torch.autograd.grad(value, logprob_NL)
    found = losses.coefficients(LOSSES[name], batch)
    mask_NL = padded(torch.ones_like(batch.logprobs_K), batch)
    torch.testing.assert_close(padded(found.logprob_K, batch), gradient_NL * mask_NL, rtol=1e-13, atol=1e-16)


def test_an_entropy_bonus_by_hand():
    """(1/N)(1/T)·0.01 for each token of a response, and GRPO's own for its log-probability."""
    batch = batch_of()
    found, without = losses.coefficients(bonus, batch), losses.coefficients(losses.grpo, batch)
    expected = [-0.01 / (N * T) for T in ragged.lengths(batch.offsets_N1).tolist() for _ in range(T)]
    assert found.entropy_K.tolist() == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(found.logprob_K, without.logprob_K, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "loss", [*(loss for loss in LOSSES.values() if loss is not losses.cispo), bonus, bonus_over_tokens]
)
def test_coefficients_are_slopes_token_by_token(loss: LossFunction):
    """By central differences in every ℓ and every h, the old policy held fixed; the weights of `cispo` would move."""
    batch, step = batch_of(kl_beta=KL_BETA), 1e-5
    found = losses.coefficients(loss, batch)
    for column, gradient_K in zip(("logprobs_K", "entropies_K"), found, strict=True):
        for k in range(len(gradient_K)):
            unit_K = step * torch.eye(len(gradient_K), dtype=torch.float64)[k]
            above, below = (loss(replace(batch, **{column: getattr(batch, column) + s * unit_K})) for s in (1, -1))
            assert gradient_K[k].item() == pytest.approx((above - below).item() / (2 * step), rel=1e-6, abs=1e-10)


@each
def test_a_token_that_does_not_count_is_as_if_it_were_not_there(name: str):
    """Also in what is divided by: the last token of every longer response is masked, against responses without it."""
    batch = batch_of(name, KL_BETA)
    lengths_N, position_K = ragged.lengths(batch.offsets_N1), ragged.position_index(batch.offsets_N1)
    of_token_N = torch.repeat_interleave(lengths_N, lengths_N)
    keep_K = (position_K < of_token_N - 1) | (of_token_N == 1)
    found = losses.coefficients(LOSSES[name], replace(batch, mask_K=keep_K.double()))
    shorter = replace(
        batch,
        **{c: getattr(batch, c)[keep_K] for c in ("logprobs_K", "entropies_K", "old_logprobs_K", "mask_K")},
        reference_logprobs_K=batch.reference_logprobs_K[keep_K],
        offsets_N1=ragged.offsets_from_lengths((lengths_N - 1).clamp_min(1)),
    )
    expected = losses.coefficients(LOSSES[name], shorter)
    torch.testing.assert_close(found.logprob_K[keep_K], expected.logprob_K, rtol=1e-13, atol=1e-17)
    assert not found.logprob_K[~keep_K].any() and (~keep_K).sum() > 5


# --- influence -------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kl_beta", [0.0, KL_BETA])
def test_influence_by_formula(name: str, kl_beta: float):
    """Its own terms; under DAPO, whose denominator is the number of tokens, also what its length does to the others."""
    batch, direction = batch_of(name, kl_beta), along()
    found_N = losses.influence(LOSSES[name], batch, direction)
    terms_N = ragged.sequence_sum(losses.coefficients(LOSSES[name], batch).dot(direction), batch.offsets_N1)
    lengths_N = ragged.lengths(batch.offsets_N1).double()
    expected_N = terms_N - lengths_N / lengths_N.sum() * terms_N.sum() if name in TOKEN_MEANS else terms_N
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [*LOSSES.values(), bonus, bonus_over_tokens])
def test_influence_is_the_slope_in_the_weight(loss: LossFunction):
    batch, direction, step = batch_of(kl_beta=KL_BETA), along(), 1e-5
    found_N = losses.influence(loss, batch, direction)

    def derivative(weights_N: Tensor) -> float:
        return losses.coefficients(loss, replace(batch, weights_N=weights_N)).dot(direction).sum().item()

    for i, unit_N in enumerate(step * torch.eye(N, dtype=torch.float64)):
        slope = (derivative(1 + unit_N) - derivative(1 - unit_N)) / (2 * step)
        assert found_N[i].item() == pytest.approx(slope, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("loss", [*LOSSES.values(), bonus_over_tokens])
def test_what_one_more_copy_of_a_response_does_to_the_gradient(loss: LossFunction):
    """Advantages as they are; under `dapo` a copy also changes the number of tokens that everything is divided by."""
    batch, direction, copies = batch_of(), along(), 100

    def derivative(chosen: list[int]) -> float:
        """Of a batch of these responses, N/len(chosen) times: the number that were drawn is divided by as it is."""
        lengths_N = ragged.lengths(batch.offsets_N1)[chosen]
        offsets_N1 = ragged.offsets_from_lengths(lengths_N)
        start_K = torch.repeat_interleave(batch.offsets_N1[chosen], lengths_N)
        pick_K = start_K + ragged.position_index(offsets_N1)
        repeated = replace(
            batch,
            **{c: getattr(batch, c)[pick_K] for c in ("logprobs_K", "entropies_K", "old_logprobs_K", "mask_K")},
            offsets_N1=offsets_N1,
            **{
                c: getattr(batch, c)[chosen]
                for c in ("advantages_N", "rewards_N", "prompts_N", "weights_N", "micro_batches_N")
            },
            responses=N * copies,
        )
        return losses.coefficients(loss, repeated).dot(TokenPair(*(x_K[pick_K] for x_K in direction))).sum().item()

    everyone = list(range(N)) * copies
    moves = [(derivative([*everyone, i]) - derivative(everyone[:i] + everyone[i + 1 :])) / 2 * copies for i in range(N)]
    expected_N, found_N = torch.tensor(moves, dtype=torch.float64), losses.influence(loss, batch, direction)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-3, atol=1e-3 * float(found_N.abs().max()))


def test_a_loss_that_leaves_the_weights_out_has_no_influence():
    def unweighted(batch: LossBatch) -> Tensor:
        return (batch.of_tokens(batch.advantages_N) * batch.logprobs_K).sum()

    with pytest.raises(RuntimeError):
        losses.influence(unweighted, batch_of(), along())
