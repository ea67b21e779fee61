"""What each part of a trainer's real step did to the entropy: a table whose parts add up to the measured change.

    ΔH = ⟨∇H, tokens + sampler + momentum + decay + rounding + unexplained⟩ + higher order

The first six are the parts of θ' − θ, and their sum is `first order`. With share_k what token k of U did by its
gradient, and π/μ the ratio of the policy to the law that drew U,

    sampler, not corrected     Σ_k (1 − W_i)·share_k,     W_i = π/μ of the whole response: what the tokens have of the
                               sampler's law in the place of the policy's, because the trainer took them as the policy's
    sampler, corrected         Σ_k (1 − 1/ρ_k)·share_k,   ρ_k = π/μ of the token: what the trainer's ratios change

and `tokens` is the rest of the gradient.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.estimates.fields import NATS, REAL, TEXT, field
from entropy_core.numerics import ragged
from entropy_core.store.columns import TokenTable

Row = dict[str, Any]

OTHER_NUMBERS = 1e-4
"""Root mean square of log π − log μ, nats, from which the sampler is another law: float32 alone makes less."""

POST_MORTEM = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field(
            "part",
            TEXT,
            "",
            "tokens, sampler, momentum, decay, rounding or unexplained, which add up to first order; higher order, "
            "which with it makes measured",
        ),
        field("delta_h", REAL, NATS, "what the part did to the entropy"),
        field("share", REAL, "1", "delta_h relative to that of first order; null where that is 0"),
        field(
            "delta_h_se",
            REAL,
            NATS,
            "its standard error: over the prompts of U for tokens and sampler, over E for measured; null for others",
        ),
    ]
)
"""A row per checkpoint × normalisation × part of the step that the trainer took."""


class Sampler(NamedTuple):
    """How the law that drew U differs from the policy.

    Args:
        log_ratio_K: log π − log μ of every token, nats, float64.
        offsets_N1: int64 [N + 1].
        corrected: whether the ratios of the loss are to it.
    """

    log_ratio_K: Tensor
    offsets_N1: Tensor
    corrected: bool

    def foreign_K(self) -> Tensor:
        """The share of each token's coefficient that is the sampler's, see above, [K]."""
        if self.corrected:
            return -(-self.log_ratio_K).expm1()
        log_weight_N = ragged.sequence_sum(self.log_ratio_K, self.offsets_N1)
        return -ragged.of_tokens(log_weight_N.expm1(), self.offsets_N1)

    def distances(self) -> dict[str, Any]:
        """`rms` and `largest` |log π − log μ|, nats; `kl`, the mean of log μ − log π; whether it is `another` law."""
        rms = float(self.log_ratio_K.square().mean().sqrt())
        largest, mean = float(self.log_ratio_K.abs().max()), float(self.log_ratio_K.mean())
        return {
            "rms": rms,
            "largest": largest,
            "kl": -mean,
            "another": rms > OTHER_NUMBERS,
            "corrected": self.corrected,
        }


class Shares(NamedTuple):
    """What the tokens of U did.

    Args:
        shares_K: of each token, nats, float64.
        offsets_N1: int64 [N + 1].
        prompts: P; their responses are adjacent, and equally many.
        sampler: the law that drew them; None: it is not known to differ.
    """

    shares_K: Tensor
    offsets_N1: Tensor
    prompts: int
    sampler: Sampler | None

    def foreign_K(self) -> Tensor:
        """What each token did that is the sampler's, [K]."""
        return torch.zeros_like(self.shares_K) if self.sampler is None else self.sampler.foreign_K() * self.shares_K

    def error(self, values_K: Tensor) -> float:
        """Standard error of a sum over the tokens of U, over its prompts."""
        of_prompts_P = ragged.sequence_sum(values_K, self.offsets_N1).view(self.prompts, -1).sum(1)
        return float(of_prompts_P.std() * self.prompts**0.5)


def sampler_of(tokens: TokenTable, corrected: bool) -> Sampler | None:
    """The sampler of U.

    Args:
        tokens: logprobs of the policy; sampling_logprobs or old_logprobs of the sampler, where they were recorded.
        corrected: whether the loss has ratios to recorded log-probabilities.

    Returns:
        None where none were recorded.
    """
    names = [name for name in ("sampling_logprobs", "old_logprobs") if name in tokens.columns]
    if not names:
        return None
    return Sampler(tokens["logprobs"].double() - tokens[names[0]].double(), tokens.offsets_N1, corrected)


def rows_of(products: Tensor, shares: Shares, measured: tuple[float, float]) -> Iterator[Row]:
    """The rows of one normalisation.

    Args:
        products: ⟨∇H, θ' − θ⟩, and ⟨∇H, ·⟩ of its parts: gradient, momentum, decay, rounding, rest; nats, float64.
        shares: what the tokens of U did; they add up to the gradient's product but for rounding.
        measured: ΔH and its standard error.

    Yields:
        A row per part.
    """
    first_order, gradient, momentum, decay, rounding, rest = products.tolist()
    of_sampler_K = shares.foreign_K()
    sampler, (change, change_se) = float(of_sampler_K.sum()), measured
    table: list[tuple[str, float, float | None]] = [
        ("tokens", gradient - sampler, shares.error(shares.shares_K - of_sampler_K)),
        ("sampler", sampler, shares.error(of_sampler_K) if shares.sampler else None),
        ("momentum", momentum, None),
        ("decay", decay, None),
        ("rounding", rounding, None),
        ("unexplained", rest, None),
        ("first order", first_order, None),
        ("higher order", change - first_order, None),
        ("measured", change, change_se),
    ]
    for part, value, error in table:
        yield {
            "part": part,
            "delta_h": value,
            "share": value / first_order if first_order else None,
            "delta_h_se": error,
        }
