"""entropy-gradient: ∇H_seq and ∇L of each half of E, by a backward pass each."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.batched_sequences import BatchedSequences
from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import Baseline, BaselineTotals, baseline_totals, returns_to_go
from entropy_core.numerics.first_order import score_coefficients
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy import Coefficients
from entropy_core.stages.columns import read_columns
from entropy_core.stages.halves import HALVES, KINDS
from entropy_core.stages.sequences import Law, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

BASELINE: Baseline = "time_loo"
"""Fixed: every baseline has the same mean, this one has little noise, and changing it would cost a backward pass."""


def entropy_gradient(
    out: "Writer",
    execution: "Execution",
    *,
    law: Law,
    sequences: "Sequence[Artifact]",
    scores: "Sequence[Artifact]",
    responses_per_prompt: int,
) -> dict[str, Any]:
    """Gradients of the estimated entropy and length.

        ∇H_seq = (1/N) Σ_i Σ_k [∇h_k + (R_k − b_k)∇ℓ_k],  ∇L = (1/N) Σ_i Σ_k (T − k − c_k)∇ℓ_k

    Two independent halves are kept apart, because their errors are independent: that tells what the variance over U is
    for a known ∇H.

    Args:
        out: the vectors `entropy_0`, `length_0` and the same of half 1, by parameter name.
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-e-batch.
        scores: the shards of score-e-batch, in the same order.
        responses_per_prompt: sequences of one prompt that stay in one half; 1 where prompts are drawn with replacement.

    Returns:
        Of each half: its number of sequences, entropy per token and mean length; and the baseline.
    """
    processor = processor_of(law, execution)
    policy, dtype = processor.policy, getattr(torch, law["dtype"])
    totals, S_N, T_N = _of_all(scores)
    ids_N = torch.cat([read_sequences(artifact).sequence_ids_N for artifact in sequences])
    half_N = ids_N // responses_per_prompt % 2
    summary = []
    for half in HALVES:
        mine_N = half_N == half
        count = int(mine_N.sum())
        for kind in KINDS:  # one after the other, at the price of another forward pass: an accumulator takes 8 bytes
            gradient = policy.new_accumulator()
            for batch, entropies_K in _shards(sequences, scores):
                score = score_coefficients(entropies_K, batch.response_offsets_N1, BASELINE, totals=totals)
                here_N = batch.sequence_ids_N // responses_per_prompt % 2 == half
                here_K = torch.repeat_interleave(here_N, batch.lengths_N)
                of_logprobs_K = {"entropy": score.entropy_K, "length": score.length_K}[kind][here_K] / count
                for index_K, rows in processor.micro_batches(batch.select(here_N.nonzero().squeeze(1))):
                    of_entropies_K = torch.full((len(index_K),), (kind == "entropy") / count, dtype=torch.float64)
                    weights = Coefficients(of_logprobs_K[index_K], of_entropies_K)
                    policy.add_gradients(rows, [weights], law["temperature"], [gradient])
            _write(out, f"{kind}_{half}", gradient, dtype)
            del gradient  # before there is another one
        H_tok = float(S_N[mine_N].sum() / T_N[mine_N].sum())
        summary.append({"sequences": count, "H_tok": H_tok, "mean_length": float(T_N[mine_N].mean())})
    return {"halves": summary, "baseline": BASELINE}


def _write(out: "Writer", name: str, gradient: dict[str, Tensor], dtype: torch.dtype) -> None:
    with out.vector(name, {of: tuple(g.shape) for of, g in gradient.items()}, dtype) as file:
        for block, values in in_blocks(gradient).items():
            file.write(block, values)


def _shards(sequences: "Sequence[Artifact]", scores: "Sequence[Artifact]") -> Iterator[tuple[BatchedSequences, Tensor]]:
    """Each shard with the entropies of its tokens, one in memory at a time."""
    for of_sequences, scored in zip(sequences, scores, strict=True):
        yield read_sequences(of_sequences), read_columns([scored], "entropies")[0]["entropies"]


def _of_all(scores: "Sequence[Artifact]") -> tuple[BaselineTotals, Tensor, Tensor]:
    """What the baselines need to know of all sequences, and the entropy S and the length T of each, float64 [N]."""
    totals, S, T = [], [], []
    for scored in scores:
        columns, offsets_N1 = read_columns([scored], "entropies")
        returns = returns_to_go(columns["entropies"], offsets_N1)
        totals.append(baseline_totals(returns, offsets_N1, BASELINE))
        S.append(ragged.sequence_sum(columns["entropies"], offsets_N1))
        T.append(ragged.lengths(offsets_N1).double())
    return reduce(BaselineTotals.plus, totals), torch.cat(S), torch.cat(T)
