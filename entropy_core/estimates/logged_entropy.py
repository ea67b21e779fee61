"""What known mistakes make of the entropy that a trainer logs, each from cached columns of the same responses.

ℓ is the log-probability of a token and h the entropy of the distribution it was drawn from, both in nats. S = Σh is
summed over a response and T is its length. The entropy per token is E[S]/E[T].

    −log π of the samples     E[−Σℓ]/E[T], of the policy or without its temperature. Of the policy its mean is the
                              entropy, with more noise, so that it differs only by chance.
    per response              E[S], which is not divided by the length.
    sequence means            E[S/T]: short responses count as much as long ones.
    micro-batches             E[ΣS/ΣT], with sums over a micro-batch: its tokens count more where it has few.
    padding                   E[S]/T', where T' is the length to which the batch is padded.
    shifted                   h of all tokens but the first, or but the last. The h that comes in its place is cached
                              nowhere: it is that after the end, or in the prompt, and taken to be as large on average
                              as h is, give or take the standard deviation of h; between two bounds, therefore.
    temperature               h of the logits that are not divided by the temperature τ: the law ∝ π^τ.
    truncated                 h of the law that top-p or top-k leaves; between two bounds.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_core.estimates.responses import Responses
from entropy_core.numerics import uncertainty
from entropy_core.numerics.uncertainty import Estimate

MICRO_BATCHES = (2, 4, 8, 16, 32)
"""Sizes that are tried where nothing says which the trainer had."""
BINS = 64
"""Groups of tokens of similar entropy, in each of which one partition function is taken for all."""

UNTEMPERED = "logits that are not divided by the temperature"


class Logged(NamedTuple):
    """What a trainer would log.

    Attributes:
        what: it is, as a phrase.
        value: nats, the middle of `value ± within` where only bounds are known.
        standard_error: over the responses.
        within: half of the distance between the bounds.
    """

    what: str
    value: float
    standard_error: float
    within: float = 0.0


class Sampling(NamedTuple):
    """How the trainer samples and logs, as far as its files say.

    Attributes:
        temperature: τ, of the policy and of the trainer.
        micro_batch: responses over which it averages at once; 0 where it is not known.
        longest: tokens that its batches are padded to; 0 where it is not known.
        top_p: mass of the nucleus; 1 for all of the vocabulary.
        top_k: number of tokens; 0 for all of the vocabulary.
    """

    temperature: float = 1.0
    micro_batch: int = 0
    longest: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def entropy_per_token(of: Responses) -> Estimate:
    """E[S]/E[T], the entropy that is meant."""
    return uncertainty.entropy(of.entropy_N, of.lengths_N, "per_token")


def known_mistakes(of: Responses, sampling: Sampling) -> Iterator[Logged]:
    """Compute what each known mistake makes of the entropy.

    Args:
        of: responses of the policy, which the trainer averages over.
        sampling: how the trainer samples and logs.

    Yields:
        One entry per mistake that is possible with these settings.
    """
    ones_N = torch.ones_like(of.lengths_N)

    def ratio(what: str, above: torch.Tensor, below: torch.Tensor) -> Logged:
        estimate = uncertainty.ratio(uncertainty.mean(above), uncertainty.mean(below))
        return Logged(what, estimate.value, uncertainty.standard_error(estimate.influence_N, of.prompts_N))

    yield ratio("the mean of −log π of the sampled tokens", of.surprisal_N, of.lengths_N)
    yield ratio("an entropy per response", of.entropy_N, ones_N)
    yield ratio("the mean of sequence means", of.entropy_N / of.lengths_N, ones_N)
    sizes = (sampling.micro_batch,) if sampling.micro_batch else MICRO_BATCHES
    for size in sizes:
        if 1 < size <= len(of) // 2:
            yield _micro_batches(of, size)
    if sampling.longest:
        yield ratio("an average that counts padding", of.entropy_N, ones_N * sampling.longest)
    mean, deviation = float(of.entropies_K.mean()), float(of.entropies_K.std(correction=0))
    for left_out_N, way in ((of.first_N, ""), (of.last_N, ", the other way")):
        middle = ratio(f"entropies that are shifted by one token{way}", of.entropy_N - left_out_N + mean, of.lengths_N)
        yield middle._replace(within=deviation / float(of.lengths_N.mean()))
    if sampling.temperature != 1:
        entropies_K, surprisals_K = _at_temperature_one(of, sampling.temperature)
        yield ratio(f"entropies of {UNTEMPERED}", of.sums(entropies_K), of.lengths_N)
        samples = "the mean of −log π of the sampled tokens, from"
        yield ratio(f"{samples} {UNTEMPERED}", of.sums(surprisals_K), of.lengths_N)
    if sampling.top_p < 1:
        yield _truncated(
            of, math.log1p(-sampling.top_p), f"the entropy of the distribution that top_p = {sampling.top_p:g}"
        )
    if sampling.top_k > 0:
        yield _truncated(
            of, -math.log(sampling.top_k + 1), f"the entropy of the distribution that top_k = {sampling.top_k}"
        )


def _micro_batches(of: Responses, size: int) -> Logged:
    """E[ΣS/ΣT] over micro-batches; neighbours, which may answer one prompt, come into different ones."""
    blocks = len(of) // size
    S_BM, T_BM = (values_N[: blocks * size].view(size, blocks).T for values_N in (of.entropy_N, of.lengths_N))
    estimate = uncertainty.mean(S_BM.sum(1) / T_BM.sum(1))
    what = f"a mean over micro-batches of {size} responses that all count alike"
    return Logged(what, estimate.value, uncertainty.standard_error(estimate.influence_N))


def _at_temperature_one(of: Responses, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """h and −ℓ of the law ∝ π^τ at every token, [K] each, from one sample each of π.

    With Z = E[π^(τ−1)] and W = E[π^(τ−1) ℓ], where the sampled token is drawn from π, h = log Z − τW/Z, and −ℓ is
    log Z − τℓ. A token has one sample, so Z and W are means over tokens whose own entropy is similar.
    """
    K = len(of.logprobs_K)
    order_K = of.entropies_K.argsort()
    group_K = torch.empty(K, dtype=torch.int64)
    group_K[order_K] = torch.arange(K) * min(BINS, K) // K
    weight_K = torch.exp((temperature - 1) * of.logprobs_K)

    def mean_of(values_K: torch.Tensor) -> torch.Tensor:
        sums_G = values_K.new_zeros(min(BINS, K)).index_add_(0, group_K, values_K)
        return sums_G / torch.bincount(group_K, minlength=min(BINS, K))

    Z_G, W_G = mean_of(weight_K), mean_of(weight_K * of.logprobs_K)
    log_Z_K = Z_G.log()[group_K]
    return log_Z_K - temperature * (W_G / Z_G)[group_K], log_Z_K - temperature * of.logprobs_K


def _truncated(of: Responses, outside: float, law: str) -> Logged:
    """Bounds of the entropy of a truncated law: a token outside of it has ℓ ≤ `outside`, and one inside may have."""
    kept_K = (of.logprobs_K > outside).double()
    mass = float(kept_K.mean())
    if not mass:
        return Logged(f"{law} leaves", 0.0, 0.0)
    lower = math.log(mass) - float((kept_K * of.logprobs_K).mean()) / mass
    upper = entropy_per_token(of)
    middle, half = (upper.value + max(lower, 0.0)) / 2, abs(upper.value - max(lower, 0.0)) / 2
    return Logged(f"{law} leaves", middle, uncertainty.standard_error(upper.influence_N, of.prompts_N), half)
