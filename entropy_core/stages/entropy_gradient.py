"""entropy-gradient: gradients of entropy (∇H_seq) and length (∇L) on each half of E, by backward passes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.numerics.functional import FUNCTIONALS
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.functional_gradient import BASELINE, functional_gradients, scored_batch
from entropy_core.sequences.processor import processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import ScoresOfE, SequencesOfE


def entropy_gradient(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    scores: "Sequence[ScoresOfE]",
    responses_per_prompt: int,
) -> dict[str, Any]:
    """Compute the gradients of the estimated entropy and length, functionals E[F] with F = Σ_k f_k.

        ∇E[F] = (1/N) Σ_i Σ_k [∇f_k + (R_k − b_k)∇ℓ_k]

    R_k is the return-to-go and b_k its baseline; weighted as in `numerics.first_order` if another law than the policy
    drew E. The gradients of two halves of E have independent errors, from which
    the variance over U for the exact ∇H can be estimated.

    Args:
        out: writer of the vectors `entropy_0`, `length_0`, `entropy_1` and `length_1`, by parameter name.
        execution: device and micro-batch size.
        policy: the policy that sampled E.
        sequences: shards of sample-e-batch.
        scores: shards of score-e-batch, in the same order.
        responses_per_prompt: number of responses to a prompt, all in the same half; 1 if prompts are drawn with
            replacement.

    Returns:
        Summary: number of sequences, entropy per token and mean length of each half, and the baseline.
    """
    processor, dtype = processor_of(policy, execution), getattr(torch, policy.dtype)
    e_batch = scored_batch(sequences, scores)
    half_N = e_batch.ids_N // responses_per_prompt % 2
    halves = [half_N == half for half in HALVES]
    names = [f"{functional.name}_{half}" for half in HALVES for functional in FUNCTIONALS]
    gradients = functional_gradients(processor, e_batch, FUNCTIONALS, halves)
    for name in names:
        _write(out, name, next(gradients), dtype)
    summary = []
    for mine_N in halves:
        S_N, T_N = e_batch.entropy_N[mine_N], e_batch.length_N[mine_N]
        H_tok = float(S_N.sum() / T_N.sum())
        summary.append({"sequences": int(mine_N.sum()), "H_tok": H_tok, "mean_length": float(T_N.mean())})
    return {"halves": summary, "baseline": BASELINE}


def _write(out: "Writer", name: str, gradient: dict[str, Tensor], dtype: torch.dtype) -> None:
    with out.vector(name, {of: tuple(g.shape) for of, g in gradient.items()}, dtype) as file:
        for block, values in in_blocks(gradient).items():
            file.write(block, values)
