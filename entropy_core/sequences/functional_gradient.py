"""Gradients of functionals E[F], F = Σ_k f_k, on a part of the evaluation batch E, by backward passes.

    ∇E[F] = (1/N) Σ_i Σ_k [∇f_k + (R_k − b_k)∇ℓ_k]

R_k is the return-to-go and b_k its baseline, from all of E. ℓ is the log-probability of a token. Weighted as in
`numerics.first_order` if another law than the policy drew E.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import TimeTotals, baseline_totals, baselines
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.first_order import score_coefficients, terms
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, LENGTH, REWARD, Functional, Tokens
from entropy_core.numerics.vectors import gradients_at_once
from entropy_core.numerics.weights import sampling_weights
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.batch import BatchedSequences, require_ids
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import SequenceProcessor
from entropy_core.store.columns import TokenTable, as_numbers, read_tokens

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact

BASELINE: Baseline = "time_loo"
"""Fixed baseline: all baselines give the same mean, this one has little noise, and a change costs a backward pass."""


class ScoredBatch(NamedTuple):
    """E with what its gradients need of all of it.

    Args:
        sequences: shards of sample-e-batch.
        scores: shards of score-e-batch, in the same order.
        totals: baseline totals of each functional over all sequences.
        entropy_N: term of each sequence in the entropy E[S], nats, float64; its S where the policy drew E.
        length_N: term of each sequence in the length E[T], float64; its T where the policy drew E.
        rewards: shards of reward-e-batch, in the same order; empty where rewards are not known.
    """

    sequences: "Sequence[Artifact]"
    scores: "Sequence[Artifact]"
    totals: dict[Functional, TimeTotals]
    entropy_N: Tensor
    length_N: Tensor
    rewards: "Sequence[Artifact]" = ()

    @property
    def ids_N(self) -> Tensor:
        """Ids of the sequences, int64."""
        return torch.cat([read_sequences(artifact).sequence_ids_N for artifact in self.sequences])

    def shards(self) -> Iterator[tuple[BatchedSequences, Tokens]]:
        """Yield each shard with ℓ and h of its tokens, one shard in memory at a time."""
        for i, (of_sequences, scored) in enumerate(zip(self.sequences, self.scores, strict=True)):
            batch = read_sequences(of_sequences)
            tokens = _tokens(_scores(scored).require(batch.identities_N, batch.response_offsets_N1))
            yield batch, tokens.rewarded(_rewards(self.rewards[i], batch)) if self.rewards else tokens


def scored_batch(
    sequences: "Sequence[Artifact]", scores: "Sequence[Artifact]", rewards: "Sequence[Artifact]" = ()
) -> ScoredBatch:
    """Read E and add up what the baselines need, one shard in memory at a time; with rewards, for `REWARD` too."""
    functionals = (*FUNCTIONALS, REWARD) if rewards else FUNCTIONALS
    none = torch.empty(0, dtype=torch.float64)
    blocks = [
        {functional: baseline_totals(functional, tokens, BASELINE) for functional in functionals}
        for _, tokens in ScoredBatch(sequences, scores, {}, none, none, rewards).shards()
    ]
    totals = {of: reduce(TimeTotals.plus, [block[of] for block in blocks]) for of in functionals}

    def of_block(functional: Functional, tokens: Tokens) -> Tensor:
        base_K = baselines(functional, tokens, BASELINE, totals[functional])
        return ragged.sequence_sum(terms(functional, tokens, base_K).value_K, tokens.offsets_N1)

    of_blocks = [[of_block(f, tokens) for f in (ENTROPY, LENGTH)] for tokens in map(_tokens, map(_scores, scores))]
    entropy_N, length_N = map(torch.cat, zip(*of_blocks, strict=True))
    return ScoredBatch(sequences, scores, totals, entropy_N, length_N, rewards)


def functional_gradients(
    processor: SequenceProcessor, e_batch: ScoredBatch, functionals: Sequence[Functional], parts: Sequence[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Compute ∇E[F] of some functionals over parts of E, as many at a time as there is room for.

    Those at a time read E once, and those of a part share forward passes, so that each is bit for bit what it is alone.

    Args:
        processor: the policy that sampled E.
        e_batch: E.
        functionals: each F; its gradient takes 8 bytes per parameter.
        parts: of each part whether a sequence is in it, bool [N].

    Yields:
        The gradients by parameter name, float64: of the first part for each functional, then of the next part.
    """
    numbers = sum(parameter.numel() for parameter in processor.policy.named_parameters().values())
    together = min(gradients_at_once(numbers), len(functionals))
    parts_at_once = max(1, gradients_at_once(numbers) // len(functionals))
    for first in range(0, len(parts), parts_at_once):
        for start in range(0, len(functionals), together):
            of_these = parts[first : first + parts_at_once]
            found = _gradients(processor, e_batch, functionals[start : start + together], of_these)
            while found:
                yield found.pop(0)  # no name for it: the next accumulators are made when it is gone


def _gradients(
    processor: SequenceProcessor, e_batch: ScoredBatch, functionals: Sequence[Functional], parts: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """Of every part for each functional, all in memory."""
    model, start = processor.policy, 0
    of_parts = [[model.new_accumulator() for _ in functionals] for _ in parts]
    for batch, tokens in e_batch.shards():
        of_tokens = [_coefficients(functional, tokens, e_batch.totals[functional]) for functional in functionals]
        for chosen_N, gradients in zip(parts, of_parts, strict=True):
            here_N = chosen_N[start : start + len(batch)]
            here_K, count = torch.repeat_interleave(here_N, batch.lengths_N), int(chosen_N.sum())
            weights = [[values_K[here_K] / count for values_K in pair] for pair in of_tokens]
            for index_K, rows in processor.micro_batches(batch.select(here_N.nonzero().squeeze(1))):
                of_rows = [Coefficients(*(values_K[index_K] for values_K in pair)) for pair in weights]
                model.add_gradients(rows, of_rows, processor.config.temperature, gradients)
        start += len(batch)
    return [gradient for gradients in of_parts for gradient in gradients]


def _coefficients(functional: Functional, tokens: Tokens, totals: TimeTotals) -> Coefficients:
    """Return the coefficients of ∇ℓ_k and ∇h_k in N·∇E[F] for the tokens of a shard."""
    slopes, weights_K = functional.slopes(tokens), sampling_weights(tokens).of(functional)
    return Coefficients(
        score_coefficients(functional, tokens, BASELINE, totals) + weights_K * slopes.logprob_K,
        weights_K * slopes.entropy_K,
    )


def _scores(scored: "Artifact") -> TokenTable:
    return read_tokens([scored], "logprobs", "entropies", optional=("proposal_logprobs",))


def _rewards(rewards: "Artifact", batch: BatchedSequences) -> Tensor:
    table = rewards.table("rewards.parquet")
    require_ids([batch], table["sequence_id"].to_pylist())
    return as_numbers(table["reward"].to_pylist())


def _tokens(table: TokenTable) -> Tokens:
    log_q_K = table.columns.get("proposal_logprobs")
    return Tokens(table["logprobs"], table["entropies"], table.offsets_N1, proposal_logprobs_K=log_q_K)
