"""entropy-gradient: gradients of entropy (∇H_seq) and length (∇L) on each half of E, by backward passes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import TimeTotals, baseline_totals, baselines
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.first_order import score_coefficients, terms
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, LENGTH, Functional, Tokens
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import in_blocks
from entropy_core.numerics.weights import sampling_weights
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
    processor = processor_of(policy, execution)
    model, dtype = processor.policy, getattr(torch, policy.dtype)
    totals = _totals(scores)
    S_N, T_N = _sums(scores, totals)
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
    slopes, weights_K = functional.slopes(tokens), sampling_weights(tokens).of(functional)
    return Coefficients(
        score_coefficients(functional, tokens, BASELINE, totals) + weights_K * slopes.logprob_K,
        weights_K * slopes.entropy_K,
    )


def _shards(sequences: "Sequence[Artifact]", scores: "Sequence[Artifact]") -> Iterator[tuple[BatchedSequences, Tokens]]:
    """Yield each shard with ℓ and h of its tokens, one shard in memory at a time."""
    for of_sequences, scored in zip(sequences, scores, strict=True):
        batch = read_sequences(of_sequences)
        yield batch, _tokens(_scores(scored).require(batch.identities_N, batch.response_offsets_N1))


def _scores(scored: "Artifact") -> TokenTable:
    return read_tokens([scored], "logprobs", "entropies", optional=("proposal_logprobs",))


def _tokens(table: TokenTable) -> Tokens:
    log_q_K = table.columns.get("proposal_logprobs")
    return Tokens(table["logprobs"], table["entropies"], table.offsets_N1, proposal_logprobs_K=log_q_K)


def _totals(scores: "Sequence[Artifact]") -> dict[Functional, TimeTotals]:
    """Return the baseline totals over all sequences."""
    blocks = [
        {functional: baseline_totals(functional, tokens, BASELINE) for functional in FUNCTIONALS}
        for tokens in map(_tokens, map(_scores, scores))
    ]
    return {functional: reduce(TimeTotals.plus, [block[functional] for block in blocks]) for functional in FUNCTIONALS}


def _sums(scores: "Sequence[Artifact]", totals: Mapping[Functional, TimeTotals]) -> tuple[Tensor, ...]:
    """Return, for entropy and length, the term of each sequence in E[F], float64 [N]."""

    def of_block(functional: Functional, tokens: Tokens) -> Tensor:
        base_K = baselines(functional, tokens, BASELINE, totals[functional])
        return ragged.sequence_sum(terms(functional, tokens, base_K).value_K, tokens.offsets_N1)

    blocks = [[of_block(f, tokens) for f in (ENTROPY, LENGTH)] for tokens in map(_tokens, map(_scores, scores))]
    return tuple(map(torch.cat, zip(*blocks, strict=True)))
