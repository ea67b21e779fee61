"""Log-probability and entropy of a step from its logits, and their derivatives along a direction.

z = logits/τ,  logp = z − logsumexp z,  ℓ = logp[token],  h = −Σ p·logp
ℓ̇ = dz[token] − Σ p·dz,                ḣ = −Σ p·logp·dz − h·Σ p·dz
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


class TokenStatistics(NamedTuple):
    """Log-probability of the token and full-softmax entropy of its step, in nats, each [K]."""

    logprobs_K: Tensor
    entropies_K: Tensor


class TokenDerivatives(NamedTuple):
    """`TokenStatistics` with their derivatives along a direction, each [K]."""

    logprobs_K: Tensor
    entropies_K: Tensor
    dlogprobs_K: Tensor
    dentropies_K: Tensor


def _log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    # The clamp owns the case 0·log 0: a logit of −inf gives p = 0 and p·logp = 0, in value and in gradient.
    return torch.log_softmax(logits_RV / temperature, dim=-1).clamp_min(torch.finfo(logits_RV.dtype).min)


def token_statistics(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> TokenStatistics:
    """ℓ and h of each row; differentiable.

    Args:
        logits_RV: [R, V], before the temperature.
        tokens_R: int64 [R].
        temperature: τ > 0, applied before the softmax.

    Returns:
        Two tensors [R] of the dtype of the logits.
    """
    logp_RV = _log_softmax(logits_RV, temperature)
    logprobs_R = logp_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)
    return TokenStatistics(logprobs_R, -(logp_RV.exp() * logp_RV).sum(-1))


def token_derivatives(logits_RV: Tensor, dlogits_RV: Tensor, tokens_R: Tensor, temperature: float) -> TokenDerivatives:
    """ℓ, h, ℓ̇ and ḣ of each row, given the logits and their derivative along a direction.

    Args:
        logits_RV: [R, V], before the temperature.
        dlogits_RV: [R, V], their derivative.
        tokens_R: int64 [R].
        temperature: τ > 0.

    Returns:
        Four tensors [R] of the dtype of the logits.
    """
    logp_RV = _log_softmax(logits_RV, temperature)
    p_RV = logp_RV.exp()
    dz_RV = dlogits_RV / temperature
    mean_dz_R = (p_RV * dz_RV).sum(-1)
    logprobs_R = logp_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)
    entropies_R = -(p_RV * logp_RV).sum(-1)
    dlogprobs_R = dz_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1) - mean_dz_R
    # −Σ p·logp·dz − h·Σ p·dz, with dz centred first: a large common shift of dz would cancel only up to rounding
    dentropies_R = -(p_RV * logp_RV * (dz_RV - mean_dz_R.unsqueeze(-1))).sum(-1)
    return TokenDerivatives(logprobs_R, entropies_R, dlogprobs_R, dentropies_R)


def expected_discriminator(logits_RV: Tensor, temperature: float) -> Tensor:
    """E_π[S*] = Σ_a π_a²(h + log π_a) of each row: what `predictors.discriminator` subtracts.

    Args:
        logits_RV: [R, V], before the temperature.
        temperature: τ > 0.

    Returns:
        Nats, [R], of the dtype of the logits.
    """
    logp_RV = _log_softmax(logits_RV, temperature)
    p_RV = logp_RV.exp()
    entropies_R1 = -(p_RV * logp_RV).sum(-1, keepdim=True)
    return (p_RV**2 * (entropies_R1 + logp_RV)).sum(-1)


def chunked_statistics(
    head: Head, hidden_KD: Tensor, tokens_K: Tensor, temperature: float, chunk_rows: int
) -> TokenStatistics:
    """ℓ and h from hidden states; logits exist for `chunk_rows` rows at a time, in the backward pass too.

    Args:
        head: maps hidden states [R, D] to logits [R, V].
        hidden_KD: [K, D].
        tokens_K: int64 [K].
        temperature: τ > 0.
        chunk_rows: rows per chunk; does not change the result.

    Returns:
        Two tensors [K].
    """

    def rows(hidden_RD: Tensor, tokens_R: Tensor) -> TokenStatistics:
        return token_statistics(head(hidden_RD), tokens_R, temperature)

    several = len(tokens_K) > chunk_rows

    def chunk(hidden_RD: Tensor, tokens_R: Tensor) -> TokenStatistics:
        if several and torch.is_grad_enabled():  # logits are recomputed in the backward pass instead of kept
            return checkpoint(rows, hidden_RD, tokens_R, use_reentrant=False)
        return rows(hidden_RD, tokens_R)

    parts = [chunk(*pair) for pair in zip(hidden_KD.split(chunk_rows), tokens_K.split(chunk_rows), strict=True)]
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def chunked_derivatives(
    head_jvp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden_KD: Tensor,
    dhidden_KD: Tensor,
    tokens_K: Tensor,
    temperature: float,
    chunk_rows: int,
) -> TokenDerivatives:
    """ℓ, h, ℓ̇ and ḣ from hidden states and their derivative, `chunk_rows` rows of logits at a time.

    Args:
        head_jvp: maps hidden states and their derivative, both [R, D], to logits and theirs, both [R, V].
        hidden_KD: [K, D].
        dhidden_KD: [K, D].
        tokens_K: int64 [K].
        temperature: τ > 0.
        chunk_rows: rows per chunk; does not change the result.

    Returns:
        Four tensors [K].
    """
    chunks = zip(*(t.split(chunk_rows) for t in (hidden_KD, dhidden_KD, tokens_K)), strict=True)
    parts = [token_derivatives(*head_jvp(a, da), tokens, temperature) for a, da, tokens in chunks]
    return TokenDerivatives(*(torch.cat(column) for column in zip(*parts, strict=True)))
