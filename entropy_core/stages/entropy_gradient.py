"""entropy-gradient: gradients of entropy (∇H_seq) and length (∇L) on each half of E, by backward passes."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import TimeTotals, baseline_totals
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.first_order import score_coefficients
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, Functional, Tokens
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy.model import Coefficients
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.columns import TokenTable, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact, Writer
    from entropy_core.store.inputs import ScoresOfE, SequencesOfE

BASELINE: Baseline = "time_loo"
"""Fixed baseline: all baselines give the same mean, this one has little noise, and a change costs a backward pass."""


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

    R_k is the return-to-go and b_k its baseline. The gradients of two halves of E have independent errors, from which
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
    processor = processor_of(policy, execution)
    model, dtype = processor.policy, getattr(torch, policy.dtype)
    totals, S_N, T_N = _of_all(scores)
    ids_N = torch.cat([read_sequences(artifact).sequence_ids_N for artifact in sequences])
    half_N = ids_N // responses_per_prompt % 2
    summary = []
    for half in HALVES:
        mine_N = half_N == half
        count = int(mine_N.sum())
        for functional in FUNCTIONALS:  # one at a time saves memory and costs an extra forward pass
            gradient = model.new_accumulator()
            for batch, tokens in _shards(sequences, scores):
                here_N = batch.sequence_ids_N // responses_per_prompt % 2 == half
                here_K = torch.repeat_interleave(here_N, batch.lengths_N)
                of_tokens = _coefficients(functional, tokens, totals[functional])
                weights = [values_K[here_K] / count for values_K in of_tokens]
                for index_K, rows in processor.micro_batches(batch.select(here_N.nonzero().squeeze(1))):
                    of_rows = Coefficients(*(values_K[index_K] for values_K in weights))
                    model.add_gradients(rows, [of_rows], policy.temperature, [gradient])
            _write(out, f"{functional.name}_{half}", gradient, dtype)
            del gradient  # before the next accumulator, which takes 8 bytes per parameter
        H_tok = float(S_N[mine_N].sum() / T_N[mine_N].sum())
        summary.append({"sequences": count, "H_tok": H_tok, "mean_length": float(T_N[mine_N].mean())})
    return {"halves": summary, "baseline": BASELINE}


def _write(out: "Writer", name: str, gradient: dict[str, Tensor], dtype: torch.dtype) -> None:
    with out.vector(name, {of: tuple(g.shape) for of, g in gradient.items()}, dtype) as file:
        for block, values in in_blocks(gradient).items():
            file.write(block, values)


def _coefficients(functional: Functional, tokens: Tokens, totals: TimeTotals) -> Coefficients:
    """Return the coefficients of ∇ℓ_k and ∇h_k in N·∇E[F] for the tokens of a shard."""
    slopes = functional.slopes(tokens)
    return Coefficients(score_coefficients(functional, tokens, BASELINE, totals) + slopes.logprob_K, slopes.entropy_K)


def _shards(sequences: "Sequence[Artifact]", scores: "Sequence[Artifact]") -> Iterator[tuple[BatchedSequences, Tokens]]:
    """Yield each shard with ℓ and h of its tokens, one shard in memory at a time."""
    for of_sequences, scored in zip(sequences, scores, strict=True):
        batch = read_sequences(of_sequences)
        yield batch, _tokens(_scores(scored).require(batch.identities_N, batch.response_offsets_N1))


def _scores(scored: "Artifact") -> TokenTable:
    return read_tokens([scored], "logprobs", "entropies")


def _tokens(table: TokenTable) -> Tokens:
    return Tokens(table["logprobs"], table["entropies"], table.offsets_N1)


def _of_all(scores: "Sequence[Artifact]") -> tuple[dict[Functional, TimeTotals], Tensor, Tensor]:
    """Return the baseline totals over all sequences, and entropy S and length T of each sequence, float64 [N]."""
    totals, S, T = [], [], []
    for tokens in map(_tokens, map(_scores, scores)):
        totals.append([baseline_totals(functional, tokens, BASELINE) for functional in FUNCTIONALS])
        S.append(ragged.sequence_sum(ENTROPY.values(tokens), tokens.offsets_N1))
        T.append(ragged.lengths(tokens.offsets_N1).double())
    of_all = [reduce(TimeTotals.plus, of_functional) for of_functional in zip(*totals, strict=True)]
    return dict(zip(FUNCTIONALS, of_all, strict=True)), torch.cat(S), torch.cat(T)
