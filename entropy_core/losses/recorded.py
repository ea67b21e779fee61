"""What a trainer recorded of U, as inputs of the loss: its advantages, and the log-probabilities of its sampler.

ℓ is the log-probability of a token under the policy that is probed, ℓ_old under the law that it was drawn from.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.losses.files import RECORDED
from entropy_core.store.columns import TokenTable, as_numbers, read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact

CLIPPED = 0.2
"""Trainers clip ratios that differ from 1 by more than this."""


def with_recorded(tokens: TokenTable, recorded: "Artifact", use_old_logprobs: bool, use_reference: bool) -> TokenTable:
    """Put beside the scores of U what was recorded of its tokens.

    Args:
        tokens: columns logprobs and entropies.
        recorded: artifact of recorded-u-batch.
        use_old_logprobs: whether ratios are to the recorded ℓ_old; else to ℓ.
        use_reference: whether the loss has a KL term whose reference was recorded.

    Returns:
        The table, with old_logprobs and reference_logprobs where they are used.
    """
    table = read_tokens(
        [recorded], file="recorded.safetensors", optional=("old_logprobs", "sampling_logprobs", "ref_logprobs")
    ).require(tokens.sequences_N, tokens.offsets_N1)
    found = {}
    old_K = table.columns.get("old_logprobs", table.columns.get("sampling_logprobs"))
    if use_old_logprobs and old_K is not None:
        found["old_logprobs"] = old_K
    if use_reference:
        found["reference_logprobs"] = table["ref_logprobs"]
    return tokens.join(TokenTable(tokens.sequences_N, tokens.offsets_N1, found))


def recorded_advantages(recorded: "Artifact") -> Tensor | None:
    """The trainer's advantages, float64 [N]; None where they were not recorded."""
    values_N = as_numbers(recorded.table("sequences.parquet")[RECORDED].to_pylist())
    return None if values_N.isnan().all() else values_N


def differences(tokens: TokenTable, computed_N: Tensor, recorded_N: Tensor | None) -> dict[str, Any]:
    """How far what was recorded is from what is computed here.

    Args:
        tokens: columns logprobs, and old_logprobs where ratios are to them.
        computed_N: advantages made of the rewards, float64 [N].
        recorded_N: those of the trainer; None where they were not recorded.

    Returns:
        `advantages`: how many of the trainer's differ from the computed ones by more than 0.1 % of the largest, and
        `largest_difference`; 0 without any. `log_ratio`, the largest |ℓ − ℓ_old| in nats, and `clipped`, the share of
        tokens whose ratio a trainer would clip; 0 where ratios are 1.
    """
    apart_N = torch.zeros_like(computed_N) if recorded_N is None else (computed_N - recorded_N).abs()
    largest = computed_N.abs().max() if recorded_N is None else torch.stack([computed_N, recorded_N]).abs().max()
    log_ratio_K = torch.zeros(int(tokens.offsets_N1[-1]), dtype=torch.float64)
    if "old_logprobs" in tokens.columns:
        log_ratio_K = tokens["logprobs"].double() - tokens["old_logprobs"]
    return {
        "advantages": int((apart_N > 1e-3 * largest).sum()),
        "largest_difference": float(apart_N.max()),
        "log_ratio": float(log_ratio_K.abs().max()),
        "clipped": float(((log_ratio_K.exp() - 1).abs() > CLIPPED).double().mean()),
    }
