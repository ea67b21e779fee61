"""Interventions on the update batch U: other weights of its tokens, other advantages, or prompts that are left out.

An intervention is a pure function of what a trainer knows of U. It returns terms, whose weighted gradients add up to
the gradient of the changed loss:

    g' = Σ_terms Σ_k w_k (c_k ∇ℓ_k + d_k ∇h_k),    c_k = ∂L/∂ℓ_k and d_k = ∂L/∂h_k of the term's batch

The losses of this package are affine in the advantages. So the policy term of a token is c(A) − c(0), the difference of
its coefficients with and without advantages, and what is left, c(0), is the KL term and the entropy bonus. A token that
is masked or reweighted keeps c(0); weights act on the policy term alone, as in the trainers that have them.

A threshold that is a quantile of U counts as a constant where the influence of a prompt is computed.

Symbols: ℓ log-probability and h entropy of a token, nats; A advantage and r reward of its response; cov the term
(ℓ − mean ℓ)(A − mean A) of a token in their covariance over U; S* = π(h + ℓ) the discriminator of `predictors`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics.advantages import STD_EPSILON
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.numerics.losses import LossFunction, coefficients, influence


class Known(NamedTuple):
    """What an intervention may go by.

    Args:
        batch: U as the loss of the run sees it.
        excess_K: S* − E_π[S*] of every token, nats, float64.
        share_K: what every token does to the entropy, (c_k a_k + d_k b_k) with the sensitivities of one half of E;
            whatever selects by it is judged on the other half. Nats per unit step, float64.
        seed: of random choices.
    """

    batch: LossBatch
    excess_K: Tensor
    share_K: Tensor
    seed: int


class Term(NamedTuple):
    """A batch and the factor of every token's coefficients in it, float64 [K]; None: 1."""

    batch: LossBatch
    weights_K: Tensor | None = None


Terms = tuple[Term, ...]
Intervention = Callable[..., Terms]
"""(known, value) → terms; without `value` where there is nothing to set."""


def term_coefficients(loss: LossFunction, terms: Terms) -> TokenPair:
    """Return c_k and d_k of the changed loss, each float64 [K]."""
    return add_up(terms, [coefficients(loss, term.batch) for term in terms])


def add_up(terms: Terms, of_each: list[TokenPair]) -> TokenPair:
    """Add the coefficients of the terms, each times the weights of its term."""
    pairs = [weighted(term, pair) for term, pair in zip(terms, of_each, strict=True)]
    return TokenPair(*(torch.stack(parts).sum(0) for parts in zip(*pairs, strict=True)))


def term_influence(loss: LossFunction, terms: Terms, along: TokenPair) -> Tensor:
    """Return the influence of each response on Σ_k (c_k a_k + d_k b_k) of the changed loss, float64 [N]."""
    return torch.stack([t.batch.weights_N * influence(loss, t.batch, weighted(t, along)) for t in terms]).sum(0)


def weighted(term: Term, pair: TokenPair) -> TokenPair:
    """Multiply both numbers of every token by its weight in a term."""
    return pair if term.weights_K is None else TokenPair(*(term.weights_K * values_K for values_K in pair))


def policy_terms(batch: LossBatch, factor_K: Tensor) -> Terms:
    """Multiply the policy term of every token by a factor, float64 [K]; KL term and entropy bonus stay."""
    return Term(batch, factor_K), Term(_with_equal_advantages(batch, 0.0), 1.0 - factor_K)


def token_advantages(batch: LossBatch, advantages_K: Tensor) -> Terms:
    """Give every token an advantage of its own, float64 [K]; KL term and entropy bonus stay."""
    return policy_terms(_with_equal_advantages(batch, 1.0), advantages_K)


def _with_equal_advantages(batch: LossBatch, value: float) -> LossBatch:
    return replace(batch, advantages_N=torch.full_like(batch.advantages_N, value))


def random(known: Known, share: float) -> Terms:
    """The null: a random share of the tokens loses the policy term, and the others are scaled by 1/(1 − share).

    The mean gradient over the random choice is that of the run, so that on average over batches nothing changes.
    """
    generator = torch.Generator().manual_seed(known.seed)
    kept_K = torch.rand(len(known.batch.logprobs_K), generator=generator, dtype=torch.float64) >= share
    return policy_terms(known.batch, kept_K.double() / (1.0 - share))


def clip_cov(known: Known, share: float, low: float = 1.0, high: float = 5.0) -> Terms:
    """Clip-Cov, arXiv:2505.22617, eq. 10 and 11: a share of all tokens, at random among those with cov in (low, high),
    loses the policy term.

    Settings of the paper and of verl's `clip_cov` loss: share 2e-4, low 1, high 5; at least one token if any has such a
    covariance.
    """
    candidates = ((covariances(known.batch) > low) & (covariances(known.batch) < high)).nonzero().squeeze(1)
    count = max(int(share * float(known.batch.mask_K.sum())), 1)
    generator = torch.Generator().manual_seed(known.seed)
    factor_K = torch.ones_like(known.batch.logprobs_K)
    factor_K[candidates[torch.randperm(len(candidates), generator=generator)[:count]]] = 0
    return policy_terms(known.batch, factor_K)


def drop_top_covariance(known: Known, share: float) -> Terms:
    """The share of the tokens with the largest cov loses the policy term: Clip-Cov of arXiv:2505.22617 without bounds
    and without chance. Its KL-Cov penalises the same tokens by |ℓ − ℓ_old|, which has no gradient on-policy.
    """
    return _without_top(known.batch, covariances(known.batch), share)


def clip_discriminator(known: Known, deviations: float) -> Terms:
    """Entropy-discriminator clipping after Clip_V of arXiv:2602.03392: tokens whose S* − E_π[S*] is more than so many
    standard deviations over U away from 0 lose the policy term. Setting here: 2.
    """
    counts_K = known.batch.mask_K > 0
    deviation = known.excess_K[counts_K].square().mean().sqrt()
    return policy_terms(known.batch, (known.excess_K.abs() <= deviations * deviation).double())


def drop_costliest(known: Known, share: float) -> Terms:
    """The share of the tokens that lower the entropy most, by this probe's own attribution on one half of E, loses the
    policy term. Judged on the other half of E: a token whose error is large is chosen for it.
    """
    return _without_top(known.batch, -known.share_K, share)


def positives_only(known: Known) -> Terms:
    """Positive sample reinforcement, arXiv:2506.01347: responses with negative advantages lose the policy term."""
    return (Term(known.batch.with_advantages(known.batch.advantages_N.clamp_min(0))),)


def negatives_only(known: Known) -> Terms:
    """Negative sample reinforcement, arXiv:2506.01347: responses with positive advantages lose the policy term."""
    return (Term(known.batch.with_advantages(known.batch.advantages_N.clamp_max(0))),)


def weighted_positives(known: Known, factor: float) -> Terms:
    """Weighted REINFORCE, arXiv:2506.01347: positive advantages are multiplied by a factor, 0.1 in the paper."""
    A_N = known.batch.advantages_N
    return (Term(known.batch.with_advantages(torch.where(A_N > 0, factor * A_N, A_N))),)


def quantile_baseline(known: Known, quantile: float) -> Terms:
    """Quantile advantage estimation, arXiv:2509.22611: A = (r − b)/(std + 1e-4) with the quantile b of the rewards of
    the group in place of their mean; 0.4 in the paper.
    """
    rewards_PG = in_groups(known.batch, known.batch.rewards_N)
    base_P1 = torch.quantile(rewards_PG, quantile, dim=1, keepdim=True, interpolation="lower")
    deviations_P1 = rewards_PG.std(dim=1, keepdim=True)
    return (Term(known.batch.with_advantages((rewards_PG - base_P1) / (deviations_P1 + STD_EPSILON))),)


def log_prob_advantage(known: Known, zeta: float) -> Terms:
    """Advantage − ζ·ℓ at every token, after arXiv:2603.11682: unlikely tokens are reinforced. Setting here: 0.01."""
    A_K = known.batch.of_tokens(known.batch.advantages_N)
    return token_advantages(known.batch, A_K - zeta * known.batch.logprobs_K.detach())


def entropy_advantage(known: Known, alpha: float, kappa: float = 2.0) -> Terms:
    """Entropy-based advantage shaping, arXiv:2506.14758, eq. 5 and 6: A + min(α·h, |A|/κ) at every token, with the
    entropy as a constant; α 0.4 and κ 2 in the paper.
    """
    A_K = known.batch.of_tokens(known.batch.advantages_N)
    return token_advantages(
        known.batch, A_K + torch.minimum(alpha * known.batch.entropies_K.detach(), A_K.abs() / kappa)
    )


def drop_likely_positives(known: Known, probability: float) -> Terms:
    """Tokens of a higher probability than this lose the policy term if their advantage is positive: the half of the
    covariance of arXiv:2505.22617 that sharpens what is sharp already. Setting here: 0.9.
    """
    A_K = known.batch.of_tokens(known.batch.advantages_N)
    dropped_K = (known.batch.logprobs_K.detach().exp() > probability) & (A_K > 0)
    return policy_terms(known.batch, 1.0 - dropped_K.double())


def dynamic_sampling(known: Known) -> Terms:
    """Dynamic sampling, DAPO, arXiv:2503.14476, eq. 11: prompts whose responses have equal rewards do not count, not
    in the sums and not in the denominators. The paper samples others in their place.
    """
    rewards_PG = in_groups(known.batch, known.batch.rewards_N)
    return _with_prompts(known.batch, rewards_PG.amax(1) > rewards_PG.amin(1))


def pass_rate(known: Known, low: float, high: float) -> Terms:
    """Difficulty filter: only prompts whose mean reward is in [low, high] count, as in arXiv:2504.03380; [0.2, 0.8]."""
    mean_P = in_groups(known.batch, known.batch.rewards_N).mean(1)
    return _with_prompts(known.batch, (mean_P >= low) & (mean_P <= high))


def covariances(batch: LossBatch) -> Tensor:
    """Return cov of every token, (ℓ − mean ℓ)(A − mean A) with means over the tokens of U that count; 0 elsewhere."""
    mask_K, A_K = batch.mask_K, batch.of_tokens(batch.advantages_N)
    centred = [x_K - (mask_K * x_K).sum() / mask_K.sum() for x_K in (batch.logprobs_K.detach(), A_K)]
    return mask_K * centred[0] * centred[1]


def in_groups(batch: LossBatch, values_N: Tensor) -> Tensor:
    """View values of responses by prompt, [P, G]."""
    return values_N.view(int(batch.prompts_N.max()) + 1, -1)


def _without_top(batch: LossBatch, values_K: Tensor, share: float) -> Terms:
    """Drop the policy term of the tokens with the largest values, at least one."""
    counts_K = batch.mask_K > 0
    count = max(round(share * int(counts_K.sum())), 1)
    ranked_K = torch.where(counts_K, values_K, -torch.inf)
    factor_K = torch.ones_like(batch.logprobs_K)
    factor_K[ranked_K.topk(count).indices] = 0
    return policy_terms(batch, factor_K)


def _with_prompts(batch: LossBatch, kept_P: Tensor) -> Terms:
    """Count some prompts only; with none left the gradient is 0."""
    kept_N = kept_P[batch.prompts_N].double()
    if not kept_N.any():
        return (Term(batch, torch.zeros_like(batch.logprobs_K)),)
    return (Term(replace(batch, weights_N=batch.weights_N * kept_N, responses=int(kept_N.sum()))),)
