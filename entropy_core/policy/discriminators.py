"""What the predictors of the literature need of a step beside ℓ and h."""

import torch
from torch import Tensor

from entropy_core.numerics import token_statistics
from entropy_core.policy.model import Policy
from entropy_core.policy.scorer import TeacherForcedRows


def expected_discriminators(policy: Policy, rows: TeacherForcedRows, temperature: float) -> Tensor:
    """Σ_a π_a²(h + log π_a) of the step of every response token: see `token_statistics.expected_discriminator`.

    Args:
        policy: the policy.
        rows: the micro-batch.
        temperature: τ.

    Returns:
        [K], of the policy's dtype, on its device.
    """
    scorer = policy.scorer
    with torch.no_grad():
        if not scorer.head_is_known:
            return token_statistics.expected_discriminator(scorer.all_logits(rows), temperature)
        chunks = scorer.hidden(rows).split(scorer.head_chunk_rows)
        parts = [token_statistics.expected_discriminator(scorer.head(chunk), temperature) for chunk in chunks]
    return torch.cat(parts)
