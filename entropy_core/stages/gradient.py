"""entropy-gradient: ∇H of E by one backward pass, for both normalisations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.numerics import ragged
from entropy_core.numerics.first_order import Baseline, score_coefficients
from entropy_core.policy import Coefficients
from entropy_core.stages.columns import read_columns
from entropy_core.stages.sequences import Law, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

BASELINE: Baseline = "time_loo"
"""Fixed: every baseline has the same mean, this one has little noise, and changing it would cost a backward pass."""


def entropy_gradient(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Sequence[Artifact]", scores: "Sequence[Artifact]"
) -> dict[str, Any]:
    """Gradient of the estimated entropy.

        ∇H_seq = (1/N) Σ_i Σ_k [∇h_k + (R_k − b_k)∇ℓ_k],  ∇L = (1/N) Σ_i Σ_k (T − k − c_k)∇ℓ_k
        ∇H_tok = (∇H_seq − H_tok·∇L)/L

    Args:
        out: `per_token.safetensors` and `per_sequence.safetensors`, by parameter name.
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-e-batch.
        scores: the shards of score-e-batch, in the same order.

    Returns:
        Norms of the two gradients, and the baseline.
    """
    processor = processor_of(law, execution)
    policy = processor.policy
    columns, offsets_N1 = read_columns(scores, "entropies")
    score = score_coefficients(columns["entropies"], offsets_N1, BASELINE)
    N, length = len(offsets_N1) - 1, float(ragged.lengths(offsets_N1).double().mean())
    H_tok = float(columns["entropies"].double().sum()) / (N * length)

    entropy_gradient, length_gradient = policy.new_accumulator(), policy.new_accumulator()
    start = 0
    for artifact in sequences:
        shard = read_sequences(artifact)
        stop = start + len(shard.response_tokens_K)
        entropy_K, length_K = score.entropy_K[start:stop] / N, score.length_K[start:stop] / N
        for index_K, rows in processor.micro_batches(shard):
            ones_K = torch.full((len(index_K),), 1.0 / N, dtype=torch.float64)
            weights = [
                Coefficients(entropy_K[index_K], ones_K),
                Coefficients(length_K[index_K], torch.zeros_like(ones_K)),
            ]
            policy.add_gradients(rows, weights, law["temperature"], [entropy_gradient, length_gradient])
        start = stop
    per_sequence = entropy_gradient
    per_token = {name: (g - H_tok * length_gradient[name]) / length for name, g in entropy_gradient.items()}
    dtype = getattr(torch, law["dtype"])
    norms = {}
    for normalization, gradient in (("per_token", per_token), ("per_sequence", per_sequence)):
        out.tensors({name: g.to(dtype).cpu() for name, g in gradient.items()}, f"{normalization}.safetensors")
        norms[normalization] = float(torch.stack([(g**2).sum() for g in gradient.values()]).sum().sqrt())
    return {"norm": norms, "baseline": BASELINE}
