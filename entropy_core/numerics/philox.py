"""Counter-based random numbers: a draw is a pure function of (seed, purpose, sequence, position).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. It has no state,
so a draw does not depend on batch size, order, shard or worker.
"""

from enum import IntEnum
from itertools import repeat

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Purpose(IntEnum):
    """Purpose of a stream of uniforms; streams with different purposes are independent at the same seed."""

    E_PROMPT = 1
    E_TOKEN = 2
    U_PROMPT = 3
    U_TOKEN = 4
    E_COMPONENT = 5


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply ten rounds of Philox to four 32-bit counter words.

    Args:
        counter: four int64 tensors of one shape, each holding a value in [0, 2³²).
        key: two integers in [0, 2³²).

    Returns:
        Four int64 tensors of the same shape, each uniform on [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1  # int64 wraps; the bits are those of uint64
        high_0, low_0 = (product_0 >> 32) & _MASK32, product_0 & _MASK32
        high_1, low_1 = (product_1 >> 32) & _MASK32, product_1 & _MASK32
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def uniforms(seed: int, purpose: Purpose, sequence: Tensor, position: Tensor | int = 0) -> Tensor:
    """Draw uniforms in (0, 1), one per (sequence, position).

    Args:
        seed: integer in [0, 2⁶⁴).
        purpose: the stream to draw from.
        sequence: sequence (or prompt) indices, int64, any shape, non-negative.
        position: int64 broadcastable with `sequence`, or one integer, in [0, 2³²).

    Returns:
        float64 with the broadcast shape; multiples of 2⁻⁵² shifted by half a step, so neither 0 nor 1 occurs.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    sequence, step = torch.broadcast_tensors(sequence, torch.as_tensor(position, device=sequence.device))
    counter = (step, sequence & _MASK32, sequence >> 32, torch.full_like(sequence, int(purpose)))
    word_0, word_1, _, _ = philox4x32(counter, (seed & _MASK32, seed >> 32))
    bits = (word_0 << 20) | (word_1 >> 12)  # 52 bits, so that adding half a step is exact in float64
    return (bits.double() + 0.5) * 2.0**-52


def draw_with_replacement(seed: int, purpose: Purpose, sequence: Tensor, pool_size: int) -> Tensor:
    """Draw the prompt index ⌊u·M⌋ of each sequence.

    Args:
        seed: integer in [0, 2⁶⁴).
        purpose: the stream to draw from.
        sequence: int64 [N].
        pool_size: M, the number of prompts.

    Returns:
        int64 [N], each in [0, M).
    """
    return (uniforms(seed, purpose, sequence) * pool_size).long().clamp_(max=pool_size - 1)


def permutation(seed: int, purpose: Purpose, pool_size: int) -> Tensor:
    """Draw a permutation of the pool, by sorting one uniform per prompt.

    Args:
        seed: integer in [0, 2⁶⁴).
        purpose: the stream to draw from.
        pool_size: M, the number of prompts.

    Returns:
        int64 [M]; its first B entries are B distinct prompts.
    """
    return torch.argsort(uniforms(seed, purpose, torch.arange(pool_size)), stable=True)


DRAWN_BYTES = 2**26
"""Bytes of float64 probabilities in memory at a time; does not change a draw."""


def inverse_cdf_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float | Tensor) -> Tensor:
    """Draw one token per row from softmax(z/τ) by inverting the CDF in float64.

    Args:
        logits_BV: z, [B, V], any float dtype.
        uniforms_B: float64 [B] in (0, 1).
        temperature: τ > 0, or one for each row, float64 [B].

    Returns:
        int64 [B]; a token of probability zero is never drawn.
    """
    rows = max(1, DRAWN_BYTES // (8 * logits_BV.shape[1]))
    parts = zip(logits_BV.split(rows), uniforms_B.split(rows), strict=True)
    of_parts = temperature.unsqueeze(1).split(rows) if isinstance(temperature, Tensor) else repeat(temperature)
    return torch.cat([_inverse_cdf_tokens(*part, of_part) for part, of_part in zip(parts, of_parts, strict=False)])


def _inverse_cdf_tokens(logits_RV: Tensor, uniforms_R: Tensor, temperature: float | Tensor) -> Tensor:
    cdf_RV = torch.softmax(logits_RV.double() / temperature, dim=-1).cumsum_(dim=-1)
    target_R1 = (uniforms_R * cdf_RV[:, -1]).unsqueeze(1)  # the last entry is 1 only up to rounding
    tokens_R1 = torch.searchsorted(cdf_RV, target_R1, right=True)
    # a target that was rounded up to the last entry must select the first token that reaches this entry
    last_possible_R1 = torch.searchsorted(cdf_RV, cdf_RV[:, -1:].contiguous())
    return torch.minimum(tokens_R1, last_possible_R1).squeeze(1)


def token_logprobs(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """Compute the log-probability of one token per row under the law that `inverse_cdf_tokens` draws from.

    Args:
        logits_BV: z, [B, V], any float dtype.
        tokens_B: int64 [B].
        temperature: τ > 0.

    Returns:
        Nats, float64 [B].
    """
    rows = max(1, DRAWN_BYTES // (8 * logits_BV.shape[1]))
    parts = zip(logits_BV.split(rows), tokens_B.unsqueeze(1).split(rows), strict=True)
    found = [(z_RV.double() / temperature).log_softmax(-1).gather(-1, tokens_R1) for z_RV, tokens_R1 in parts]
    return torch.cat(found).squeeze(1)
