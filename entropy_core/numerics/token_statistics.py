"""Log-probability ℓ of a token and entropy h of its distribution from logits, and their derivatives along a direction.

z = logits/τ,  logp = z − logsumexp z,  ℓ = logp[token],  h = −Σ p·logp
ℓ̇ = dz[token] − Σ p·dz,                ḣ = −Σ p·logp·dz − h·Σ p·dz

z and dz are taken relative to the likeliest token, and its weight of 1 is left out of the sum r of the others, so that
logsumexp z = log1p(r). Where one token is nearly certain, everything is of the order of r, and added to 1 it would be
rounded away.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

LOWEST = -1e4
"""Lower clamp of log-probabilities in products p·log p, so that 0·log 0 is 0: its exponential is 0 in every dtype."""

BLOCK_BYTES = 2**22  # size of one block of rows on a CPU, chosen to stay in the cache


class TokenStatistics(NamedTuple):
    """Log-probability ℓ of each token and full-softmax entropy h of its distribution, in nats, each [K]."""

    logprobs_K: Tensor
    entropies_K: Tensor


class TokenDerivatives(NamedTuple):
    """`TokenStatistics` and their derivatives along a direction, each [K]."""

    logprobs_K: Tensor
    entropies_K: Tensor
    dlogprobs_K: Tensor
    dentropies_K: Tensor


def token_statistics(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> TokenStatistics:
    """Compute ℓ and h of each row; differentiable once, in reverse or forward mode.

    Args:
        logits_RV: logits before the temperature, [R, V]; −inf marks an impossible token.
        tokens_R: int64 [R].
        temperature: τ > 0, applied before the softmax.

    Returns:
        ℓ and h, each [R], in the dtype of the logits.
    """
    logprobs_R, entropies_R, *_ = _TokenStatistics.apply(logits_RV, tokens_R, temperature)
    return TokenStatistics(logprobs_R, entropies_R)


class _TokenStatistics(torch.autograd.Function):
    """Saves only the logits and a few numbers per row for the derivatives, and recomputes probabilities from them."""

    @staticmethod
    def forward(logits_RV: Tensor, tokens_R: Tensor, temperature: float) -> tuple[Tensor, ...]:
        scratch = _Scratch(logits_RV, 2)
        blocks = [
            _TokenStatistics._of_rows(scratch, temperature, *rows) for rows in scratch.blocks(logits_RV, tokens_R)
        ]
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True))

    @staticmethod
    def _of_rows(scratch: "_Scratch", temperature: float, logits_RV: Tensor, tokens_R: Tensor) -> tuple[Tensor, ...]:
        z_RV, weights_RV = scratch.of(logits_RV)
        likeliest_R1 = logits_RV.argmax(-1, keepdim=True)
        torch.sub(logits_RV, logits_RV.gather(-1, likeliest_R1), out=z_RV)
        if temperature != 1.0:
            z_RV /= temperature
        own_R = z_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)
        torch.exp(z_RV.clamp_min_(LOWEST), out=weights_RV)
        rest_R = weights_RV.scatter_(-1, likeliest_R1, 0.0).sum(-1)
        normaliser_R = rest_R.log1p()
        entropies_R = normaliser_R - z_RV.mul_(weights_RV).sum(-1) / (1.0 + rest_R)  # two non-negative terms
        return own_R - normaliser_R, entropies_R, likeliest_R1, normaliser_R.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        logits_RV, tokens_R, ctx.temperature = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept[1:])
        ctx.save_for_backward(logits_RV, tokens_R, *kept)
        ctx.save_for_forward(logits_RV, tokens_R, *kept)

    @staticmethod
    def backward(ctx: Any, dlogprobs_R: Tensor, dentropies_R: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, tokens_R, entropies_R, *of_rows = ctx.saved_tensors
        logp_RV, p_RV = torch.empty_like(logits_RV), torch.empty_like(logits_RV)
        _log_probabilities((logp_RV, p_RV), ctx.temperature, logits_RV, *of_rows)
        # ∂ℓ/∂z = 1[token] − p,  ∂h/∂z = −p·(logp + h)
        factor_R, own_R1 = entropies_R * dentropies_R + dlogprobs_R, tokens_R.unsqueeze(-1)
        own_logp_R1 = logp_RV.gather(-1, own_R1)
        gradient_RV = logp_RV.mul_(dentropies_R.unsqueeze(-1)).add_(factor_R.unsqueeze(-1)).mul_(p_RV).neg_()
        of_entropy_R1 = own_logp_R1.exp() * (own_logp_R1 + entropies_R.unsqueeze(-1)) * dentropies_R.unsqueeze(-1)
        gradient_RV.scatter_(-1, own_R1, -own_logp_R1.expm1() * dlogprobs_R.unsqueeze(-1) - of_entropy_R1)
        return gradient_RV.div_(ctx.temperature), None, None

    @staticmethod
    def jvp(ctx: Any, dlogits_RV: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        logits_RV, tokens_R, _entropies_R, *of_rows = ctx.saved_tensors
        scratch = _Scratch(logits_RV, 3)
        rows_by_block = scratch.blocks(dlogits_RV, tokens_R, logits_RV, *of_rows)
        blocks = [_TokenStatistics._jvp_of_rows(scratch, ctx.temperature, *rows) for rows in rows_by_block]
        return *(torch.cat(column) for column in zip(*blocks, strict=True)), None, None

    @staticmethod
    def _jvp_of_rows(
        scratch: "_Scratch", temperature: float, dlogits_RV: Tensor, tokens_R: Tensor, *kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        logp_RV, p_RV, product_RV = scratch.of(dlogits_RV)
        _log_probabilities((logp_RV, p_RV), temperature, *kept)
        dz_RV = dlogits_RV if temperature == 1.0 else dlogits_RV / temperature
        of_likeliest_R1, of_own_R1 = (dz_RV.gather(-1, index_R1) for index_R1 in (kept[1], tokens_R.unsqueeze(-1)))
        mean_R1 = torch.sub(dz_RV, of_likeliest_R1, out=product_RV).mul_(p_RV).sum(-1, keepdim=True)
        dlogprobs_R1 = of_own_R1 - of_likeliest_R1 - mean_R1
        # −Σ p·logp·dz − h·Σ p·dz, with dz centred first, because a common shift of dz would only cancel up to rounding
        centred_RV = torch.sub(dz_RV, of_likeliest_R1 + mean_R1, out=product_RV)
        return dlogprobs_R1.squeeze(-1), -logp_RV.mul_(p_RV).mul_(centred_RV).sum(-1)


class _Scratch:
    """Scratch buffers reused for every block of rows, because allocating memory costs more than the arithmetic.

    On a CPU a block is a few rows, so that it stays in the cache; on a GPU it is all rows.
    """

    def __init__(self, like_RV: Tensor, count: int) -> None:
        rows = BLOCK_BYTES // (like_RV.shape[-1] * like_RV.itemsize) if like_RV.is_cpu else len(like_RV)
        self.rows = max(1, min(rows, len(like_RV)))
        self.room = [like_RV.new_empty(self.rows, like_RV.shape[-1]) for _ in range(count)]

    def blocks(self, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(column.split(self.rows) for column in columns), strict=True)

    def of(self, block_RV: Tensor) -> list[Tensor]:
        return [room_RV[: len(block_RV)] for room_RV in self.room]


def _log_probabilities(
    into: tuple[Tensor, Tensor], temperature: float, logits_RV: Tensor, likeliest_R1: Tensor, normaliser_R1: Tensor
) -> None:
    logp_RV, p_RV = into
    torch.sub(logits_RV, logits_RV.gather(-1, likeliest_R1), out=logp_RV)
    if temperature != 1.0:
        logp_RV /= temperature
    logp_RV -= normaliser_R1
    torch.exp(logp_RV.clamp_min_(LOWEST), out=p_RV)


def expected_discriminator(logits_RV: Tensor, temperature: float) -> Tensor:
    """Compute E_π[S*] = Σ_a π_a²(h + log π_a) of each row, which `predictors.discriminator` needs.

    Args:
        logits_RV: logits before the temperature, [R, V].
        temperature: τ > 0.

    Returns:
        Nats, [R], in the dtype of the logits.
    """
    logp_RV = torch.log_softmax(logits_RV / temperature, dim=-1).clamp_min(LOWEST)
    p_RV = logp_RV.exp()
    entropies_R1 = -(p_RV * logp_RV).sum(-1, keepdim=True)
    return (p_RV**2 * (entropies_R1 + logp_RV)).sum(-1)


def chunked_statistics(
    head: Head, hidden_KD: Tensor, tokens_K: Tensor, temperature: float, chunk_rows: int
) -> TokenStatistics:
    """Compute ℓ and h from hidden states, with logits of `chunk_rows` rows in memory at a time, even in derivatives.

    Args:
        head: maps hidden states [R, D] to logits [R, V].
        hidden_KD: [K, D].
        tokens_K: int64 [K].
        temperature: τ > 0.
        chunk_rows: maximum rows per chunk; chunks have equal sizes, because a short one costs nearly as much as a long
            one. Does not change the result.

    Returns:
        ℓ and h, each [K].
    """

    def rows(hidden_RD: Tensor, tokens_R: Tensor) -> TokenStatistics:
        return token_statistics(head(hidden_RD), tokens_R, temperature)

    count = max(1, -(-len(tokens_K) // chunk_rows))

    def chunk(hidden_RD: Tensor, tokens_R: Tensor) -> TokenStatistics:
        if count > 1 and torch.is_grad_enabled():  # logits are recomputed in the backward pass instead of kept
            return checkpoint(rows, hidden_RD, tokens_R, use_reentrant=False)
        return rows(hidden_RD, tokens_R)

    parts = [chunk(*pair) for pair in zip(hidden_KD.tensor_split(count), tokens_K.tensor_split(count), strict=True)]
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))
