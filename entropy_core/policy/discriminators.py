"""E_π[S*] of every token, an input of the `discriminator` predictor (arXiv:2602.03392)."""

import torch
from torch import Tensor

from entropy_core.numerics import token_statistics
from entropy_core.policy.model import Policy
from entropy_core.policy.scorer import TeacherForcedRows


def expected_discriminators(policy: Policy, rows: TeacherForcedRows, temperature: float) -> Tensor:
    """Compute E_π[S*] = Σ_a π_a²(h + log π_a) at every response token; π is its distribution and h its entropy.

    Args:
        policy: the policy.
        rows: the micro-batch.
        temperature: sampling temperature τ.

    Returns:
        Nats, [K], in the policy's dtype and on its device.
    """
    scorer = policy.scorer
    with torch.no_grad():
        if not scorer.head_is_known:
            return token_statistics.expected_discriminator(scorer.all_logits(rows), temperature)
        chunks = scorer.hidden(rows).split(scorer.head_chunk_rows)
        parts = [token_statistics.expected_discriminator(scorer.head(chunk), temperature) for chunk in chunks]
    return torch.cat(parts)
